"""Processes that end with the one that started them, however that one ends."""

import ctypes
import functools
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends. Does nothing elsewhere than on Linux.

    parent: process id of that thread. If it has ended already, no signal will come, and this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def outlive_signals(*_: object) -> None:
    """Leave SIGTERM, SIGINT and SIGUSR1 to the `multiprocessing` parent of this process, and end with it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with_parent(parent.pid)


@functools.cache
def forks_end_with_this_process() -> None:
    """Have every process that this one forks from now on end with it, and those that they fork with them."""
    parent = os.getpid()

    def note() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: end_with_parent(parent))
