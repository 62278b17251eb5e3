"""Checks of options, and warnings about names that change."""

import functools
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)


def check(condition: bool, option: str, value: Any, right: str) -> None:
    """Raise a ValueError that names the option as the user typed it, its value, and what would be right."""
    if not condition:
        raise ValueError(f"{option}={value}: {right}")


@functools.cache
def deprecated(old: str, new: str) -> None:
    """Log a warning, once and on the first process of a job, that a command or an option's value has a new name."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s is deprecated and will be removed in the next version; use %s", old, new)
