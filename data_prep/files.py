"""Files that are whole or absent: written under a temporary name, made durable, then renamed.

with writing(path) as temporary:
    temporary.write_text("...")          # killed here: no file called `path`
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_PREFIX = ".unfinished-"


def temporary(path: Path) -> Path:
    """Name beside `path` under which it is written."""
    return path.with_name(TEMPORARY_PREFIX + path.name)


def publish(path: Path) -> None:
    """Make what stands under `temporary(path)` durable and give it its final name."""
    with open(temporary(path), "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary(path), path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; publish it as `path` if the block ends well, else remove it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary(path)
        publish(path)
    finally:
        temporary(path).unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
