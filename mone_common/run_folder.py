"""What lies in the folder of a run, for every command that reads it; imports no torch.

status = read_status(folder)          # {"state": "stopped", "step": 100, "reason": "SIGNAL", ...}
records = read_metrics(folder)        # [{"step": 5, "train/loss": 7.9, ...}, ...]
options = read_config(folder)         # {"model.activation_ratio": 0.25, ...}
folders = find_runs([Path("runs")])   # those that hold runs, also within sweeps
check_free(folder)                    # a run can have it to itself
with lock_run_folder(folder): ...                # nobody else trains there

A file that is not what a run writes raises DamagedFile, which names it.
"""

import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mone_common.locks import LOCK_FILE, is_locked, lock
from mone_common.text import printable

Parsed = TypeVar("Parsed")

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
FROZEN_FILE = "launch/frozen.yaml"
METRICS_FILE = "metrics.jsonl"
STATUS_FILE = "status.json"
READING_FILE = "data.json"
PUBLISHED_FILE = "published.json"
CHECKPOINT_NAME = re.compile(r"step-([0-9]{1,18})")
HYDRAS = ("defaults", "hydra")
"""Parts of a frozen configuration that are no options of a run."""


class DamagedFile(ValueError):
    """A file of a run folder cannot be read, or is not what a run writes; the message names it and what is wrong."""


def read_status(folder: Path) -> dict[str, Any]:
    """What a run last said of itself; {} if nothing; DamagedFile.

    state: running, complete, stopped (in good order, the same command continues) or failed; time: in seconds since 1970;
    step and reason where there are any; exit_code of what failed.
    """
    text = read_file(folder / STATUS_FILE)
    if text is None:
        return {}
    found = _parsed(folder / STATUS_FILE, text)
    if not isinstance(found, dict) or not isinstance(found.get("state"), str) or not is_number(found.get("time", 0)):
        raise DamagedFile(f"{printable(folder / STATUS_FILE)}: needs an object with a text `state` and a number `time`")
    return found


def read_state(folder: Path) -> str:
    """The state of `read_status`, or: not started, crashed."""
    state = str(read_status(folder).get("state", "not started"))
    # A process that was killed could not say so; elsewhere, what it says is all there is.
    return "crashed" if state == "running" and not in_use(folder) else state


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run so far; lines that are no records are left out; DamagedFile if the file cannot be read."""
    return examine_metrics(folder)[0]


def examine_metrics(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """The same, and what is wrong with the lines left out."""
    return examine_lines(folder / METRICS_FILE, _record)


def examine_lines(path: Path, parse: Callable[[Any], Parsed | None]) -> tuple[list[Parsed], str | None]:
    """What `parse` makes of the JSON of each line of a file, and what is wrong with the lines of which it makes None.

    A last line cut short by a kill is nothing wrong. DamagedFile if the file cannot be read.
    """
    *lines, rest = (read_file(path) or b"").split(b"\n")
    found, damaged = [], []
    for number, line in enumerate([*lines, *([rest] if rest else [])], start=1):
        try:
            parsed = parse(json.loads(line.decode()))
        except (ValueError, RecursionError):
            parsed = None
        if parsed is not None:
            found.append(parsed)
        elif number <= len(lines):
            damaged.append(number)
    if not damaged:
        return found, None
    lines_are = "lines are" if len(damaged) > 1 else "line is"
    return found, f"{printable(path)}: {len(damaged)} {lines_are} damaged and left out, first line {damaged[0]}"


def _record(found: Any) -> dict[str, Any] | None:
    return found if isinstance(found, dict) and is_number(found.get("step")) else None


def is_number(value: Any) -> bool:
    """Whether it is a number, finite also as a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def read_reading(folder: Path) -> list[dict[str, Any]]:
    """What a run reads of each source: name, share of the blend, tokens, tokens read, epochs; [] if it has not said so.

    DamagedFile for a file of another kind.
    """
    path = folder / READING_FILE
    text = read_file(path)
    found = [] if text is None else _parsed(path, text)
    numbers = ("share", "tokens", "read", "epochs")
    if not isinstance(found, list) or not all(
        isinstance(source, dict)
        and isinstance(source.get("name"), str)
        and all(is_number(source.get(number)) for number in numbers)
        for source in found
    ):
        raise DamagedFile(f"{printable(path)}: needs a list of objects with a text `name` and numbers {', '.join(numbers)}")
    return found


def _parsed(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{printable(path)}: no JSON ({error})") from error


def read_published(folder: Path) -> dict[str, Any]:
    """The `run` id and the `step` of the last checkpoint that a run published; {} if it noted none that can be read."""
    try:
        found = json.loads(read_file(folder / PUBLISHED_FILE) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("run"), str) else {}


def last_published(folder: Path) -> int | None:
    """The step of the last checkpoint that a run has saved, by its own word; None if it has saved none.

    Also of runs of earlier versions, which did not note it: their records and their status tell.
    """
    try:
        status = read_status(folder)
    except DamagedFile:
        status = {}
    steps = [
        read_published(folder).get("step"),
        status.get("step") if status.get("state") in ("complete", "stopped") else None,
    ]
    steps += [record["step"] for record in read_metrics(folder) if "checkpoint/write_seconds" in record]
    return max((step for step in steps if isinstance(step, int)), default=None)


def last_step(records: list[dict[str, Any]]) -> int:
    """Of a run with these records; 0 without any."""
    return int(records[-1]["step"]) if records else 0


def last_value(records: list[dict[str, Any]], name: str) -> float | None:
    """Of a metric, where it was defined."""
    return next((record[name] for record in reversed(records) if is_number(record.get(name))), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The run's composed options by their names on the command line; {} if there are none; DamagedFile.

    Of a run that is queued and has not begun, those it was queued with.
    """
    for path in (folder / CONFIG_FILE, folder / FROZEN_FILE):
        text = read_file(path)
        if text is None:
            continue
        try:
            found = OmegaConf.to_container(OmegaConf.load(io.StringIO(text.decode())))
        except (ValueError, OSError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
            raise DamagedFile(f"{printable(path)}: no options in YAML ({' '.join(str(error).split())})") from error
        if not isinstance(found, dict) or not found:
            raise DamagedFile(f"{printable(path)}: holds no options")
        return flat({str(name): value for name, value in found.items() if name not in HYDRAS})
    return {}


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


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names; lists stay as they are."""
    options: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        options |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return options


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
