"""Processes that end with the one that started them, however that one ends."""

import ctypes
import functools
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends. Does nothing elsewhere than on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_signals(*_: object) -> None:
    """Leave SIGTERM, SIGINT and SIGUSR1 to the process that started this one, and end with it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


@functools.cache
def forks_end_with_this_process() -> None:
    """Do so in every process that this one forks from now on."""
    os.register_at_fork(after_in_child=end_with_parent)
