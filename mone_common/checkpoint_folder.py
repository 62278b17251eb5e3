"""The checkpoints of a run on disk: list, publish and delete them. For one process; imports no torch.

    found, problems = list_checkpoints(folder)                # checks manifests and file sizes; oldest first
    remove_leftovers(folder)                                  # of interrupted saves
    publish(unfinished, step=200, noted={...})                # give a written checkpoint its name
    prune(folder, step=200, run=..., keep_last=2)             # delete older checkpoints of the same run

A checkpoint is written under a temporary name, with its manifest last, and renamed when everything is on disk. A folder
named step-* is therefore complete. The manifest holds facts about the run, and size and sha256 of every file.

Only folders named step-<number> are checkpoints. Only regular files in them are read. publish and prune delete only complete
checkpoints of the same run. publish renames anything else that has the name of the new checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from mone_common.files import sha256_of, writing
from mone_common.run_folder import CHECKPOINT_NAME
from mone_common.text import excerpt

MANIFEST = "mone.json"
FORMAT = "mone-checkpoint-3"
METADATA, COMMON, BACKEND = ".metadata", "common.pt", "metadata.json"
LARGEST_JSON = 64 * 2**20
"""Largest size of a manifest in bytes. The manifest of ten thousand ranks has a few million bytes."""
LEFTOVER = re.compile(r"\.unfinished-(step|delete-step)-[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path
    step: int
    noted: dict[str, Any]
    """Other entries of the manifest, unchecked; `train.checkpoint_facts.read_facts` checks them."""
    files: dict[str, dict[str, Any]]
    """`size` in bytes and `sha256` by file name."""

    def is_of(self, run: str | None) -> bool:
        """Whether the run with this id wrote the checkpoint under this name; False for a copy or link made by a user."""
        own_name = self.path.name == name_of(self.step) and not self.path.is_symlink()
        return own_name and self.noted.get("run") == run


def name_of(step: int) -> str:
    """The folder name of the checkpoint of a step."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path, *, run: str | None = None) -> tuple[list[Checkpoint], list[str]]:
    """The complete checkpoints in a folder, oldest first, and the problems of the others.

    run: the id of the run that the folder belongs to, if known; checkpoints with another id are problems. Never raises: an
    unreadable entry or folder is a problem.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.startswith("step-"))
    except FileNotFoundError:
        return [], [f"{folder}: is a link to {os.readlink(folder)}, which does not exist"] if folder.is_symlink() else []
    except OSError as error:
        return [], [f"{folder}: cannot be read ({error.strerror})"]
    found, problems = [], []
    for path in paths:
        try:
            checkpoint = read_manifest(path)
            _check_place(checkpoint, run)
            found.append(checkpoint)
        except ValueError as error:
            problems.append(f"{excerpt(path)}: {error}")
    return sorted(found, key=lambda checkpoint: checkpoint.step), problems


def _check_place(checkpoint: Checkpoint, run: str | None) -> None:
    match = CHECKPOINT_NAME.fullmatch(checkpoint.path.name)
    if match is None:
        raise ValueError("ignored: its name is not step-<number>")
    if int(match[1]) != checkpoint.step:
        raise ValueError(f"ignored: its name does not match the step in its {MANIFEST}, {checkpoint.step}")
    of = checkpoint.noted.get("run")
    if run is not None and of is not None and of != run:
        raise ValueError(f"foreign: it belongs to the run with id {excerpt(of)}, not to this run, {run}")


def read_manifest(path: Path) -> Checkpoint:
    """Read the manifest of a published checkpoint; ValueError if it is foreign, or a file is missing or has another size."""
    try:
        noted = read_json(path / MANIFEST)
        files, step = noted.pop("files"), noted["step"]
        sizes = {name: of_file["size"] for name, of_file in files.items()}
        digests = [of_file["sha256"] for of_file in files.values()]
        known = noted["format"] == FORMAT
        if not all(type(number) is int and number >= 0 for number in (step, *sizes.values())):
            raise TypeError("a size or the step is not a number")
        if not all(isinstance(digest, str) for digest in digests):
            raise TypeError("a digest is not a string")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"foreign: no {MANIFEST}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged or foreign: {MANIFEST} cannot be read ({excerpt(error)})") from error
    if not known:
        raise ValueError(f"foreign: format {excerpt(noted['format'])}, not {FORMAT}")
    if missing := {METADATA, BACKEND} - sizes.keys():
        raise ValueError(f"damaged: {MANIFEST} does not list {', '.join(sorted(missing))}")
    for name, expected in sizes.items():
        with open_regular(path, name) as file:
            size = os.fstat(file.fileno()).st_size
        if size != expected:
            raise ValueError(f"damaged: {name} has {size} bytes, not {expected}")
    return Checkpoint(path, step, noted, files)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a regular file; OSError, or ValueError for other or larger content."""
    with open_regular(path.parent, path.name) as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"larger than {LARGEST_JSON} bytes")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def open_regular(folder: Path, name: str) -> BufferedReader:
    """Open a file of a checkpoint for reading.

    FileNotFoundError if the manifest is missing; ValueError if another file is missing, outside the folder or not regular.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"damaged or foreign: {MANIFEST} names {excerpt(name)!r}, which is not a file name")
    try:
        # Without O_NONBLOCK, opening a pipe blocks.
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        if name == MANIFEST:
            raise
        raise ValueError(f"damaged: {excerpt(name)} is missing") from error
    except (OSError, UnicodeError) as error:
        if isinstance(error, NotADirectoryError):
            raise
        raise ValueError(f"damaged: {excerpt(name)} cannot be read ({excerpt(error)})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"damaged: {excerpt(name)} is not a regular file")
    return open(descriptor, "rb")


def check_content(checkpoint: Checkpoint, name: str) -> None:
    """ValueError unless a file has the size and sha256 of the manifest. The size is compared first."""
    expected = checkpoint.files[name]
    with open_regular(checkpoint.path, name) as file:
        same = os.fstat(file.fileno()).st_size == expected["size"]
        if not same or hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise ValueError(f"damaged: the content of {name} does not match its sha256")


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def remove_leftovers(folder: Path) -> list[str]:
    """Remove folders of interrupted saves; return notes on what cannot be removed, which does no harm."""
    notes = []
    for path in sorted(folder.glob(".unfinished-*")):
        if LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            notes += _remove(path)
        else:
            notes.append(f"{excerpt(path)} is kept: it is not a folder of a save")
    return notes


def free_name(path: Path) -> Path:
    """The path, or the first of PATH.2, PATH.3, ... that does not exist."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{number}")
    return free


def publish(unfinished: Path, *, step: int, noted: dict[str, Any]) -> tuple[Path, list[str]]:
    """Write the manifest of a complete checkpoint, flush everything to disk, and give the checkpoint its name.

    noted: further entries of the manifest, such as the facts of `train.checkpoint_facts`.

    Returns the path and notes for the user. A checkpoint of the same run and step is deleted; anything else with that name
    is renamed. OSError if the checkpoint cannot be published.
    """
    files: dict[str, Any] = {}
    for digests in unfinished.glob("digests-*.json"):
        files |= json.loads(digests.read_text())
        digests.unlink()
    for path in unfinished.iterdir():
        if path.name not in files:
            files[path.name] = digest(path)
    with writing(unfinished / MANIFEST) as temporary:
        temporary.write_text(json.dumps({"format": FORMAT, "step": step, **noted, "files": files}, indent=1))
    _flush(unfinished)
    final = unfinished.with_name(name_of(step))
    notes = _make_way(final, noted.get("run")) if os.path.lexists(final) else []
    os.replace(unfinished, final)
    _flush(final.parent)
    return final, notes


def _make_way(final: Path, run: str | None) -> list[str]:
    try:
        own = read_manifest(final).is_of(run)
    except ValueError:
        own = False
    if own:
        return _delete(final)
    aside = free_name(final.with_name(f"replaced-{final.name}"))
    os.replace(final, aside)
    return [f"{final} was not a complete checkpoint of this run; it is kept as {aside}"]


def prune(
    folder: Path,
    *,
    step: int,
    run: str | None,
    keep_last: int,
    keep_every: int | None = None,
    spared: Collection[int] = (),
    uncounted: Collection[int] = (),
) -> list[str]:
    """Delete older checkpoints of a run after that of `step` is published; return notes for the user.

    Considers only complete checkpoints of this run. `choose_old` decides which to delete.
    """
    own = {found.step: found.path for found in list_checkpoints(folder)[0] if found.is_of(run)}
    counted = own.keys() - set(uncounted)
    old = choose_old(counted, step=step, keep_last=keep_last, keep_every=keep_every, spared=spared)
    return [note for doomed in old for note in _delete(own[doomed])]


def choose_old(
    steps: Collection[int], *, step: int, keep_last: int, keep_every: int | None, spared: Collection[int]
) -> list[int]:
    """Choose the checkpoints to delete after that of `step` is published.

    Kept are the keep_last newest up to `step`, multiples of keep_every, and `spared` ones, such as the one resumed from.
    Checkpoints newer than `step` are neither counted nor deleted: the run skipped them and will reach their steps again.
    """
    older = sorted(of for of in steps if of < step)
    kept = set(older[max(0, len(older) - keep_last + 1) :]) | set(spared)
    return [of for of in older if of not in kept and (keep_every is None or of % keep_every)]


def _delete(path: Path) -> list[str]:
    """Rename a checkpoint, then delete it, so that no incomplete checkpoint ever has the name of one."""
    doomed = free_name(path.with_name(f".unfinished-delete-{path.name}"))
    try:
        os.replace(path, doomed)
    except OSError as error:
        return [f"{path} cannot be deleted ({error.strerror})"]
    return _remove(doomed)


def _remove(path: Path) -> list[str]:
    try:
        shutil.rmtree(path)
    except OSError as error:
        return [f"{path} cannot be removed ({error.strerror}: {error.filename}); remove it by hand"]
    return []


def _flush(folder: Path) -> None:
    """Call fsync on every file of a folder and on the folder."""
    for path in [*(path for path in folder.iterdir() if path.is_file() and not path.is_symlink()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
