"""Run folders: file names, search for runs, and locks. Imports no torch.

folders = find_runs([Path("runs")])   # folders of runs, including those of sweeps
check_free(folder)                    # ValueError if a run cannot use the folder
with lock_run_folder(folder): ...     # no other run uses the folder
"""

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from mone_common.locks import LOCK_FILE, is_locked, lock
from mone_common.text import printable

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
FROZEN_FILE = "launch/frozen.yaml"
METRICS_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
READING_FILE = "data.json"
PUBLISHED_FILE = "published.json"
CHECKPOINT_NAME = re.compile(r"step-([0-9]{1,18})")


class DamagedFile(ValueError):
    """A file of a run folder cannot be read or has invalid content; the message names the file and the problem."""


def saved_steps(folder: Path) -> list[int]:
    """The sorted steps of the checkpoints in a run folder, from their names only; DamagedFile."""
    saves = folder / "checkpoints"
    try:
        names = [name for name in os.listdir(saves) if os.path.isdir(saves / name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DamagedFile(f"{printable(saves)}: cannot be read ({error.strerror})") from error
    return sorted(int(match[1]) for name in names if (match := CHECKPOINT_NAME.fullmatch(name)))


def read_file(path: Path) -> bytes | None:
    """The content of a regular file; None if it does not exist; DamagedFile if it cannot be read."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFile(f"{printable(path)}: cannot be read ({error.strerror})") from error
    # Reading a pipe could block forever.
    if not os.path.isfile(path):
        raise DamagedFile(f"{printable(path)}: not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{printable(path)}: cannot be read ({error.strerror})") from error


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Those of these folders that are run folders, and the run folders below the others, such as the points of a sweep.

    Each folder is listed once, even if several links lead to it. Unreadable subfolders are included, so that the caller
    reports them. ValueError if a folder does not exist, or no run is found.
    """
    folders = list(folders)
    seen = set[str]()
    found = [run for folder in folders for run in _runs_within(folder, seen)]
    missing = [folder for folder in folders if not os.path.isdir(folder)] or ([] if found else folders)
    if missing:
        raise ValueError(f"{', '.join(map(printable, missing))}: no run there (a run's folder has {CONFIG_FILE})")
    return found


def check_readable(folder: Path) -> None:
    """DamagedFile if a folder cannot be listed."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise DamagedFile(f"{printable(folder)}: cannot be read ({error.strerror})") from error


def _runs_within(folder: Path, seen: set[str]) -> list[Path]:
    """Run folders that are not in `seen`. Adds the real path of every visited folder to `seen`."""
    runs, waiting = list[Path](), [folder]
    while waiting:
        folder = waiting.pop()
        if not os.path.isdir(folder) or (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            runs.append(folder)
            continue
        if any(name in names for name in (CONFIG_FILE, METRICS_FILE, STATUS_FILE)) or os.path.lexists(folder / FROZEN_FILE):
            runs.append(folder)
        else:
            waiting += [folder / name for name in reversed(names)]
    return runs


def check_free(folder: Path, *, sweep: bool = False) -> None:
    """ValueError unless a new run, or with `sweep` a sweep, can use this folder, which need not exist."""
    try:
        place = Path(os.path.realpath(folder))
        problem = _why_not_free(place, sweep)
    except OSError as error:  # a name that is too long, a file where a folder should be, no permission
        problem = f"cannot be a folder ({error.strerror})"
    if problem is not None:
        raise ValueError(f"run.dir={folder}: {problem}; give another folder, e.g. run.dir=runs/mine")


def _why_not_free(place: Path, sweep: bool) -> str | None:
    if _is_run(place):
        return None
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is not a folder"
    here, home = Path.cwd(), Path(os.path.realpath(os.path.expanduser("~")))
    if place in (here, home, *here.parents, *home.parents):
        return "is the current or the home folder, or one above them"
    if outer := next((parent for parent in place.parents if _is_run(parent)), None):
        return f"is within the run {outer}"
    if sweep:
        return None
    if place == here / "runs":
        return "is the folder that contains all runs"
    inner = _run_below(place)
    return f"holds other runs, such as {inner}" if inner else None


def _is_run(folder: Path) -> bool:
    """Whether a run has started in this folder or is queued."""
    begun = (folder / CONFIG_FILE).exists() and (folder / ENVIRONMENT_FILE).exists()
    return begun or (folder / FROZEN_FILE).exists()


def _run_below(folder: Path) -> Path | None:
    """A run up to two levels below this folder, or None."""
    below = (run for pattern in ("*", "*/*") for run in folder.glob(pattern))
    return next((run for run in below if _is_run(run)), None)


def lock_run_folder(folder: Path) -> IO[str]:
    """Lock a run folder until the returned file is closed; ValueError if another run has the lock."""
    if (folder / LOCK_FILE).exists() and not (folder / LOCK_FILE).is_file():
        raise ValueError(f"run.dir={folder}: {folder / LOCK_FILE} is not a file; remove it")
    file = open(folder / LOCK_FILE, "w")  # noqa: SIM115  it is the lock
    for attempt in range(10):
        if lock(file):
            return file
        # The lock may be of a process that was just killed.
        time.sleep(0.5 if attempt < 9 else 0)
    raise ValueError(f"run.dir={folder}: another run uses it; wait for it, or give another run.dir or run.name")


def in_use(folder: Path) -> bool:
    """Whether a process trains in this folder, on any machine that shares the locks of the file system."""
    return is_locked(folder / LOCK_FILE)
