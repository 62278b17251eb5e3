"""Locks among processes, by the operating system: whoever holds one lets go of it however it ends.

    with open(folder / LOCK_FILE, "w") as file:
        if not lock(file): ...                # another process has it
    is_locked(folder / LOCK_FILE)

The file must be open for writing: some file systems (NFS) lock no other. Where a file system has no locks, every lock is
given, and each process says so once.
"""

import fcntl
import functools
import logging
from pathlib import Path
from typing import IO, Any

LOCK_FILE = ".lock"
logger = logging.getLogger(__name__)


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file for as long as it stays open; False if another process has the lock, which `wait` waits for."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        _tell_once(Path(file.name).parent, error.strerror)
    return True


def is_locked(path: Path) -> bool:
    """Whether a process on a machine that shares this file system's locks holds the lock of this file."""
    if not path.is_file():
        return False
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # a file system without locks, or another user's folder, whose lock is theirs alone to open
    return False


@functools.cache
def _tell_once(folder: Path, reason: str) -> None:
    logger.warning(
        "%s: this file system has no locks (%s): see to it that one process alone works there at a time", folder, reason
    )
