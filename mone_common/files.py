"""Files that are whole or absent: written under a temporary name, made durable, then renamed.

with writing(path) as temporary:
    temporary.write_text("...")          # killed here: no file called `path`
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
    """Name beside `path` under which it is written."""
    return path.with_name(TEMPORARY_PREFIX + path.name)


def publish(path: Path, unfinished: Path | None = None) -> None:
    """Make what stands under `unfinished`, else `temporary(path)`, durable and give it its final name."""
    unfinished = unfinished or temporary(path)
    _sync(unfinished)
    os.replace(unfinished, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary path to write; publish it as `path` if the block ends well, else remove it.

    shared: several processes may write the same file at a time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(path)
    if shared:
        unfinished = unfinished.with_name(f"{unfinished.name}-{uuid.uuid4().hex}")
    _remove(unfinished)  # a pipe or a folder of this name would be waited for, or in the way
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
    """As `writing`, for a folder of files that is not there yet."""
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
