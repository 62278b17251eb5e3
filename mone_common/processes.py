"""Processes that end with the one that started them, however that one ends."""

import atexit
import ctypes
import functools
import multiprocessing
import os
import shutil
import signal
import sys
from multiprocessing.util import get_temp_dir

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, by: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it ends. Does nothing elsewhere than on Linux.

    parent: process id of that thread. If it has ended already, no signal will come, and this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def outlive_signals(*_: object) -> None:
    """Leave SIGTERM, SIGINT, SIGHUP and SIGUSR1 to the `multiprocessing` parent of this process, and end with it.

    Then it removes what `multiprocessing` has put into the temporary folder for this process.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    process = multiprocessing.parent_process()
    assert process is not None
    assert process.pid is not None
    parent = process.pid

    def leave(*_: object) -> None:
        if os.getppid() != parent:  # else somebody else's signal
            # At a usual end of Python's this comes after a queue whose reader is gone, for ever.
            shutil.rmtree(get_temp_dir(), ignore_errors=True)
            os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGUSR2, leave)
    end_with_parent(parent, signal.SIGUSR2)


@functools.cache
def kill_daemons_at_exit() -> None:
    """Kill the daemonic `multiprocessing` children that are left when this process ends.

    Python would send them SIGTERM and wait: for ever, if they `outlive_signals`.
    """

    def kill() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of its workers
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(kill)  # comes before Python's own, which is registered earlier


@functools.cache
def forks_end_with_this_process() -> None:
    """Have every process that this one forks from now on end with it, and those that they fork with them."""
    parent = os.getpid()

    def note() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: end_with_parent(parent))
