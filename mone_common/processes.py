"""Child processes that end when their parent ends, even if it is killed."""

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
    """Make the kernel send this process the signal `by` when the thread that started it ends. Has an effect on Linux only.

    parent: process id of the parent. If it has already ended, this process ends immediately.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def outlive_signals(*_: object) -> None:
    """Ignore SIGTERM, SIGINT, SIGHUP and SIGUSR1 in this `multiprocessing` child, and end it when its parent ends.

    At the end, the child removes the temporary folder of `multiprocessing`.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    process = multiprocessing.parent_process()
    assert process is not None
    assert process.pid is not None
    parent = process.pid

    def leave(*_: object) -> None:
        if os.getppid() != parent:  # otherwise the signal is not from the kernel
            # Python's own cleanup would first wait forever for the reader of a queue.
            shutil.rmtree(get_temp_dir(), ignore_errors=True)
            os.kill(os.getpid(), signal.SIGKILL)

    signal.signal(signal.SIGUSR2, leave)
    end_with_parent(parent, signal.SIGUSR2)


@functools.cache
def kill_daemons_at_exit() -> None:
    """Kill the remaining daemonic `multiprocessing` children when this process ends.

    Python would send SIGTERM and wait forever for children that called `outlive_signals`.
    """

    def kill() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each worker
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()

    atexit.register(kill)  # runs before Python's own handler, which is registered earlier


@functools.cache
def forks_end_with_this_process() -> None:
    """Make all later forks of this process end when it ends, and recursively their forks."""
    parent = os.getpid()

    def note() -> None:
        nonlocal parent
        parent = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: end_with_parent(parent))
