"""File locks between processes. The operating system releases them when a process ends.

    with open(folder / LOCK_FILE, "w") as file:
        if not lock(file): ...                # another process has it
    is_locked(folder / LOCK_FILE)

Open the file for writing, which NFS requires. On a file system without locks every lock succeeds, and each process
prints one warning.
"""

import fcntl
import functools
import logging
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".lock"
logger = logging.getLogger(__name__)


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock a file until it is closed. Returns False if another process has the lock; with `wait`, waits for it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        _warn_once(Path(file.name).parent, error.strerror)
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file, on any machine that shares the locks of the file system."""
    if not path.is_file():
        return False
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # a file system without locks, or a folder of another user with an unreadable lock
    return False


@functools.cache
def _warn_once(folder: Path, reason: str) -> None:
    logger.warning(
        "%s: this file system has no locks (%s): make sure that only one process uses the folder at a time", folder, reason
    )
