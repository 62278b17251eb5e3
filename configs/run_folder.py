"""What lies in the folder of a run, for every command that reads it; imports no torch.

status = read_status(folder)          # {"state": "stopped", "step": 100, "reason": "SIGNAL", ...}
records = read_metrics(folder)        # [{"step": 5, "train/loss": 7.9, ...}, ...]
options = read_config(folder)         # {"model.activation_ratio": 0.25, ...}
folders = find_runs([Path("runs")])   # those that hold runs, also within sweeps
check_free(folder)                    # a run can have it to itself
with hold(folder): ...                # nobody else trains there
"""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from configs.locks import LOCK_FILE, is_locked, lock

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
FROZEN_FILE = "launch/frozen.yaml"
METRICS_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
READING_FILE = "data.json"


def read_status(folder: Path) -> dict[str, Any]:
    """What a run last said of itself; {} if nothing.

    state: running, complete, stopped (in good order, the same command continues) or failed; time: in seconds since 1970;
    step and reason where there are any; exit_code of what failed.
    """
    path = folder / STATUS_FILE
    found = json.loads(path.read_text()) if path.exists() else {}
    assert isinstance(found, dict)
    return found


def read_state(folder: Path) -> str:
    """The state of `read_status`, or: not started, ended without a word."""
    state = str(read_status(folder).get("state", "not started"))
    # A process that was killed could not say so; elsewhere, what it says is all there is.
    return "ended without a word" if state == "running" and not in_use(folder) else state


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run so far; a last line cut short by a kill is left out."""
    path = folder / METRICS_FILE
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def read_reading(folder: Path) -> list[dict[str, Any]]:
    """What a run reads of each source: name, share of the blend, tokens, tokens read, epochs; [] if it has not said so."""
    path = folder / READING_FILE
    found = json.loads(path.read_text()) if path.exists() else []
    assert isinstance(found, list)
    return found


def last_step(records: list[dict[str, Any]]) -> int:
    """Of a run with these records; 0 without any."""
    return int(records[-1]["step"]) if records else 0


def last_value(records: list[dict[str, Any]], name: str) -> float | None:
    """Of a metric, where it was defined."""
    return next((record[name] for record in reversed(records) if record.get(name) is not None), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The run's composed options by their names on the command line; {} if there are none.

    Of a run that is queued and has not begun, those it was queued with.
    """
    for path in (folder / CONFIG_FILE, folder / FROZEN_FILE):
        if path.exists():
            return flat(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    return {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names; lists stay as they are."""
    options: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        options |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return options


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """These folders where they hold runs, else the runs in their subfolders, such as the points of a sweep.

    Each once. ValueError for a folder that is not there, or if there is no run in any.
    """
    folders = list(folders)
    found = {run.resolve(): run for folder in folders for run in _runs_within(folder)}
    missing = [folder for folder in folders if not folder.is_dir()] or ([] if found else folders)
    if missing:
        raise ValueError(f"{', '.join(map(str, missing))}: no run there (a run's folder has {CONFIG_FILE})")
    return list(found.values())


def _runs_within(folder: Path) -> list[Path]:
    if (folder / CONFIG_FILE).exists() or (folder / "launch").exists():
        return [folder]
    subfolders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [run for subfolder in subfolders for run in _runs_within(subfolder)]


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


def hold(folder: Path) -> IO[str]:
    """Lock a run folder for as long as the file that is returned stays open; ValueError if another run has it."""
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
