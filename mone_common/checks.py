"""Checks of options, and deprecation warnings."""

import functools
import logging
import os
import sys
from typing import Any

logger = logging.getLogger(__name__)


def check(condition: bool, option: str, value: Any, right: str) -> None:
    """Raise a ValueError unless `condition`.

    option: as the user types it. right: what would be valid, for the message.
    """
    if not condition:
        raise ValueError(f"{option}={value}: {right}")


@functools.cache
def deprecated(old: str, new: str) -> None:
    """Warn on stderr, once and on rank 0, that a command or an option's value has a new name."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s is deprecated and will be removed in the next version; use %s", old, new)


def is_number(value: Any) -> bool:
    """Whether the value is a number that is finite as a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
