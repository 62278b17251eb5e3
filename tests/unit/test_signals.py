"""A run saves and stops when its terminal is closed, and continues under nohup."""

import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from train.signals import STOP_SIGNALS, StopReason, StopRequest


@pytest.fixture(autouse=True)
def _restored_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("before", "reason"), [(signal.SIG_DFL, StopReason.SIGNAL), (signal.SIG_IGN, StopReason.NONE)], ids=["terminal", "nohup"]
)
def test_sighup_stops_a_run_unless_it_is_ignored(before: Any, reason: StopReason) -> None:
    signal.signal(signal.SIGHUP, before)
    request = StopRequest(math.inf)
    os.kill(os.getpid(), signal.SIGHUP)
    assert request.noted is reason
