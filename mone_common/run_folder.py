"""The folder of a run: its files by name, which folders hold runs, and whose a folder is; imports no torch.

folders = find_runs([Path("runs")])   # those that hold runs, also within sweeps
check_free(folder)                    # a run can have it to itself
with lock_run_folder(folder): ...     # nobody else trains there
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
    """A file of a run folder cannot be read, or is not what a run writes; the message names it and what is wrong."""


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run folder by their names, intact or not, in order; DamagedFile."""
    saves = folder / "checkpoints"
    try:
        names = [name for name in os.listdir(saves) if os.path.isdir(saves / name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DamagedFile(f"{printable(saves)}: cannot be read ({error.strerror})") from error
    return sorted(int(match[1]) for name in names if (match := CHECKPOINT_NAME.fullmatch(name)))


def read_file(path: Path) -> bytes | None:
    """The content of a regular file; None where there is nothing of this name; DamagedFile."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFile(f"{printable(path)}: cannot be read ({error.strerror})") from error
    # What is no file, such as a pipe, could be waited for without end.
    if not os.path.isfile(path):
        raise DamagedFile(f"{printable(path)}: not a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedFile(f"{printable(path)}: cannot be read ({error.strerror})") from error


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """These folders where they hold runs, else the runs in their subfolders, such as the points of a sweep.

    Each once, however many links lead there. ValueError for a folder that is not there, or if there is no run in any. A
    subfolder that cannot be read is among them: whoever reads it finds out why.
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
    """Those not in `seen`, which gets the real path of every folder on the way."""
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
    """ValueError unless this folder, which need not exist, can be a run's alone, or with `sweep` that of a sweep's runs."""
    try:
        place = Path(os.path.realpath(folder))
        problem = _why_not_free(place, sweep)
    except OSError as error:  # a name that is too long, a file in place of a folder, no permission to look
        problem = f"cannot be a folder ({error.strerror})"
    if problem is not None:
        raise ValueError(f"run.dir={folder}: {problem}; give a folder of its own, e.g. run.dir=runs/mine")


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
        return f"lies within the run {outer}"
    if sweep:
        return None
    if place == here / "runs":
        return "is where all runs lie"
    inner = _run_below(place)
    return f"holds other runs, such as {inner}" if inner else None


def _is_run(folder: Path) -> bool:
    """Whether a run has begun here or is queued."""
    begun = (folder / CONFIG_FILE).exists() and (folder / ENVIRONMENT_FILE).exists()
    return begun or (folder / FROZEN_FILE).exists()


def _run_below(folder: Path) -> Path | None:
    """A run in this folder, or in one of its folders, as a sweep's are."""
    below = (run for pattern in ("*", "*/*") for run in folder.glob(pattern))
    return next((run for run in below if _is_run(run)), None)


def lock_run_folder(folder: Path) -> IO[str]:
    """Lock a run folder for as long as the file that is returned stays open; ValueError if another run has it."""
    if (folder / LOCK_FILE).exists() and not (folder / LOCK_FILE).is_file():
        raise ValueError(f"run.dir={folder}: {folder / LOCK_FILE} is no file; remove it")
    file = open(folder / LOCK_FILE, "w")  # noqa: SIM115  it is the lock
    for attempt in range(10):
        if lock(file):
            return file
        # Of a process that was just killed, perhaps.
        time.sleep(0.5 if attempt < 9 else 0)
    raise ValueError(f"run.dir={folder}: another run works there; wait for it, or give another run.dir or run.name")


def in_use(folder: Path) -> bool:
    """Whether a process on a machine that shares this file system's locks trains there now."""
    return is_locked(folder / LOCK_FILE)
