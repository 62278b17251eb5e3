"""Atomic files: written under a temporary name, flushed to disk, then renamed.

with writing(path) as temporary:
    temporary.write_text("...")          # after a kill here, `path` does not exist
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_PREFIX = ".unfinished-"


def temporary(path: Path) -> Path:
    """Temporary name for writing `path`, in the same folder."""
    return path.with_name(TEMPORARY_PREFIX + path.name)


def publish(path: Path, unfinished: Path | None = None) -> None:
    """Flush `unfinished`, by default `temporary(path)`, to disk and rename it to `path`."""
    unfinished = unfinished or temporary(path)
    _sync(unfinished)
    os.replace(unfinished, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Flush a file's content or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Context with a temporary path to write to. It becomes `path` at the end, or is removed if the block raises.

    shared: several processes may write the same file at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    if shared:
        unfinished = unfinished.with_name(f"{unfinished.name}-{uuid.uuid4().hex}")
    _remove(unfinished)  # writing to an existing pipe would block, to a folder fail
    try:
        yield unfinished
        publish(path, unfinished)
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Like `writing`, for a folder of files that does not exist yet."""
    unfinished = temporary(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for file in unfinished.iterdir():
            _sync(file)
        publish(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
