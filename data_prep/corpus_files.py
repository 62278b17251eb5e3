"""Finds the files of a corpus and detects changes of them.

found = find_files("data/**/*.jsonl", format=None)
found.files, found.left_out              # paths in order; files of folders that are not text
state = state_of(found.files[0])         # changes when the file is written to or replaced
"""

import fnmatch
import glob
import hashlib
import itertools
import json
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.errors import DataError
from data_prep.readers import BINARY_FORMATS, FORMATS, format_of
from data_prep.text_files import compression_of

CARDS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")
"""Metadata files of the `datasets` library."""
SAVED_STATE = "state.json"
"""File in which `save_to_disk` of `datasets` lists the data files of a folder."""
END_BYTES = 1 << 20


class FoundFiles(NamedTuple):
    """The files that `corpus.path` matches."""

    files: list[Path]
    """Files in the order of the entries, sorted within an entry; each file once, even if several paths lead to it."""
    left_out: dict[Path, str]
    """Files of folders that are not read, each with the reason."""


class FileState(NamedTuple):
    """Size and modification time of a file; without the inode, which network file systems may renumber."""

    bytes: int
    mtime_ns: int


def find_files(path: Any, format: str | None) -> FoundFiles:
    """The files that `corpus.path` matches: a file, a folder, a glob, or a list of these.

    Links to files and folders are followed. Hidden files and folders match only if the pattern names them.

    Raises DataError, naming the path, if nothing matches or a match is not a text file.
    """
    files: dict[str, Path] = {}
    left_out: dict[Path, str] = {}
    for entry in map(str, path if isinstance(path, list | tuple) else [path]):
        for file in _files_of(entry, format, left_out):
            files.setdefault(os.path.realpath(file), file)
    others = {os.path.realpath(path): path for path in left_out}
    return FoundFiles(list(files.values()), {path: left_out[path] for real, path in others.items() if real not in files})


def would_find(path: Any, format: str | None, file: Path) -> bool:
    """Whether `find_files` would find a file that does not exist yet; links within the corpus are not considered."""
    for entry in map(str, path if isinstance(path, list | tuple) else [path]):
        if Path(entry).is_dir():
            pattern = (*Path(glob.escape(os.path.realpath(entry))).parts, "**", "*")
        else:
            parts = Path(entry).absolute().parts
            plain = len(list(itertools.takewhile(lambda part: not glob.has_magic(part), parts)))
            pattern = (*Path(glob.escape(os.path.realpath(Path(*parts[:plain])))).parts, *parts[plain:])
        if not Path(entry).suffix and not (format or format_of(file)):
            continue
        if _fits(Path(os.path.realpath(file)).parts, pattern):
            return True
    return False


def state_of(path: Path) -> FileState:
    """The state of a file; OSError if it does not exist."""
    status = path.stat()
    return FileState(status.st_size, status.st_mtime_ns)


def fingerprint_of(path: Path) -> dict[str, Any]:
    """Path, size, and sha256 of the first and the last MiB; hashing whole files would take too long."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        ends = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        ends += file.read()
    return {"path": str(path), "bytes": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}


def _files_of(entry: str, format: str | None, left_out: dict[Path, str]) -> list[Path]:
    path = Path(entry)
    try:
        if path.is_dir():
            files = _texts_of_a_folder(_matches(Path(glob.escape(entry), "**", "*")), format, left_out)
            missing = f"no file in this folder has a suffix of {', '.join(FORMATS)}; set corpus.format"
        elif os.path.lexists(path):
            files, missing = [path], ""
        else:
            files = _matches(path)
            missing = "no such file, folder or glob match"
            if files and not (files := [file for file in files if not file.is_dir()]):
                missing = "matches folders only; name one, or add /** for all files in them"
            if files and not path.suffix:  # a pattern with a suffix, e.g. *.json or README.*, chooses its files
                files = _texts_of_a_folder(files, format, left_out)
                missing = f"no matching file has a suffix of {', '.join(FORMATS)}; set corpus.format"
    except OSError as error:
        raise DataError(f"corpus.path={entry}: {error.filename}: {error.strerror}") from error
    if not files:
        raise DataError(f"corpus.path={entry}: {missing}")
    for file in files:
        _check(file, format)
    return files


def _check(file: Path, format: str | None) -> None:
    """Raise DataError if a path is not a text file, without opening it."""
    try:
        str(file).encode()
        mode = file.stat().st_mode
    except UnicodeEncodeError:
        raise DataError(f"{ascii(str(file))}: the name is not UTF-8, so the manifest cannot contain it. Rename it") from None
    except OSError as error:
        what = "a broken link" if file.is_symlink() else "cannot be read"
        raise DataError(f"{file}: {what} ({error.strerror})") from error
    if stat.S_ISFIFO(mode):
        raise DataError(
            f"{file}: a pipe, but a corpus is read more than once. Write the text to a file; it may be compressed "
            "(gz, bz2, xz, zst, lz4)"
        )
    if not stat.S_ISREG(mode):
        kind = "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise DataError(f"{file}: {kind}, not a text file")
    if not (format or format_of(file)):
        raise DataError(f"{file}: its suffix is not that of a format; set corpus.format to one of {', '.join(FORMATS)}")
    if (format or format_of(file)) in BINARY_FORMATS and compression_of(file):
        raise DataError(
            f"{file}: {format or format_of(file)} files have internal compression and are not read from {file.suffix}. "
            "Decompress it first"
        )


def _matches(pattern: Path) -> list[Path]:
    """Sorted matches of a glob. Unlike the standard library's glob, it stops at links that lead back to a parent."""
    return sorted(set(_walk(pattern.parts)))


def _walk(pattern: tuple[str, ...]) -> Iterator[Path]:
    """Matches of a pattern; searches each folder once per remaining pattern, even if several links lead to it."""
    searched: set[tuple[str, int]] = set()
    if pattern[-1] == "**":
        pattern += ("*",)
    folders, linked = deque([(Path(), pattern)]), deque[tuple[Path, tuple[str, ...]]]()
    while folders or linked:  # links last, so that a file is found by its path without links if there is one
        folder, (head, *rest) = (folders or linked).popleft()
        key = os.path.realpath(folder), len(rest)
        if key in searched:
            continue
        searched.add(key)
        if head == "**":
            folders.append((folder, tuple(rest)))
        for path in _entries(folder, head):
            below = (head, *rest) if head == "**" else tuple(rest)
            if not below:
                yield path
            elif path.is_dir():
                (linked if path.is_symlink() else folders).append((path, below))


def _entries(folder: Path, pattern: str) -> Iterator[Path]:
    """Entries of a folder that match one component of a glob."""
    if not glob.has_magic(pattern):
        if os.path.lexists(folder / pattern):
            yield folder / pattern
        return
    for name in sorted(os.listdir(folder)):
        if _is_named(name, pattern):
            yield folder / name


def _is_named(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) and (pattern.startswith(".") or not name.startswith("."))


def _fits(path: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path matches a pattern as in `_walk`."""
    if not path or not pattern:
        return not path and not pattern
    (name, *below), (head, *rest) = path, pattern
    if head == "**":
        return _fits(path, tuple(rest) or ("*",)) or (_is_named(name, "*") and _fits(tuple(below), pattern))
    return (name == head or _is_named(name, head)) and _fits(tuple(below), tuple(rest))


def _texts_of_a_folder(paths: Iterable[Path], format: str | None, left_out: dict[Path, str]) -> list[Path]:
    """The text files among the contents of a folder."""
    files = []
    for path in paths:
        if not path.is_dir():
            if format or format_of(path):
                files.append(path)
            else:
                left_out[path] = "no suffix of a text format"
    return _without_cards(files, format, left_out)


def _without_cards(files: list[Path], format: str | None, left_out: dict[Path, str]) -> list[Path]:
    """Leave out descriptions of data: metadata of `datasets`, and a README next to files that are not Markdown.

    In a folder of `save_to_disk`, only the files that state.json lists are read, in that order.
    """
    order: dict[Path, Path] = {}  # sort keys
    saved = set()
    if format in (None, "arrow"):
        for state in (file for file in files if file.name == SAVED_STATE and file.is_file()):
            if (listed := _listed_in(state)) is not None:
                saved.add(state.parent)
                order |= {file: file.with_name(f"{n:09}") for n, file in enumerate(listed)}
    described = {
        folder for file in files if file.suffix.lower() != ".md" and file.name not in CARDS for folder in file.parents
    }
    texts = []
    for file in files:
        if file.parent in saved and file not in order:
            left_out[file] = f"not a data file that {SAVED_STATE} lists"
        elif file.name in CARDS or (file.name.lower() == "readme.md" and file.parent in described):
            left_out[file] = "describes the data"
        elif file not in order:
            texts.append(file)
    return sorted([*texts, *order], key=lambda file: order.get(file, file))


def _listed_in(state: Path) -> list[Path] | None:
    """The data files that the state.json of `save_to_disk` lists; None if `state` is another file."""
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        listed = [state.with_name(file["filename"]) for file in content["_data_files"]]
    except (ValueError, KeyError, TypeError):
        return None
    if content.get("_indices_files") or content.get("_indices_data_files"):
        raise DataError(f"{state}: lists index files, which are not supported. Write the dataset again with save_to_disk")
    return listed
