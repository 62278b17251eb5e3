"""Read status, metrics and options from a run folder. Imports no torch.

status = read_status(folder)          # {"state": "stopped", "step": 100, "reason": "SIGNAL", ...}
records = read_metrics(folder)        # [{"step": 5, "train/loss": 7.9, ...}, ...]
options = read_config(folder)         # {"model.activation_ratio": 0.25, ...}

A file with invalid content raises DamagedFile, which names the file.
"""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mone_common.checks import is_number
from mone_common.run_folder import (
    CONFIG_FILE,
    FROZEN_FILE,
    METRICS_FILE,
    PUBLISHED_FILE,
    READING_FILE,
    STATUS_FILE,
    DamagedFile,
    in_use,
    read_file,
)
from mone_common.text import printable

Parsed = TypeVar("Parsed")

HYDRAS = ("defaults", "hydra")
"""Keys of a frozen configuration that are not options of a run."""


def read_status(folder: Path) -> dict[str, Any]:
    """The content of status.json; {} if there is none; DamagedFile.

    state: running, complete, stopped (the same command continues the run) or failed; time: in seconds since 1970; step and
    reason if there are any; exit_code of a failure.
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
    # A killed process leaves the state "running", but not the lock.
    return "crashed" if state == "running" and not in_use(folder) else state


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run; invalid lines are skipped; DamagedFile if the file cannot be read."""
    return examine_metrics(folder)[0]


def examine_metrics(folder: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Like `read_metrics`, with a message about skipped lines or None."""
    return examine_lines(folder / METRICS_FILE, _record)


def examine_lines(path: Path, parse: Callable[[Any], Parsed | None]) -> tuple[list[Parsed], str | None]:
    """Parse each line of a JSONL file, and return a message about invalid lines, or None.

    parse: returns None for an invalid line. An incomplete last line, as after a kill, is ignored. DamagedFile if the file
    cannot be read.
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
    return found, f"{printable(path)}: {len(damaged)} {lines_are} damaged and skipped, first line {damaged[0]}"


def _record(found: Any) -> dict[str, Any] | None:
    return found if isinstance(found, dict) and is_number(found.get("step")) else None


def read_reading(folder: Path) -> list[dict[str, Any]]:
    """Name, share of the blend, tokens, tokens read and epochs of each source; [] if there is no data.json.

    DamagedFile for invalid content.
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
        raise DamagedFile(f"{printable(path)}: not JSON ({error})") from error


def read_published(folder: Path) -> dict[str, Any]:
    """The `run` id and the `step` of the last published checkpoint; {} if there is no valid published.json."""
    try:
        found = json.loads(read_file(folder / PUBLISHED_FILE) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("run"), str) else {}


def last_published(folder: Path) -> int | None:
    """The step of the last checkpoint that a run has recorded; None if there is none.

    For runs of earlier versions without published.json, the step comes from metrics and status.
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
    """The step of the last record; 0 without records."""
    return int(records[-1]["step"]) if records else 0


def last_value(records: list[dict[str, Any]], name: str) -> float | None:
    """The last defined value of a metric, or None."""
    return next((record[name] for record in reversed(records) if is_number(record.get(name))), None)


def read_config(folder: Path) -> dict[str, Any]:
    """The composed options of a run by their names on the command line; {} if there are none; DamagedFile.

    For a queued run that has not started, the options that it was queued with.
    """
    for path in (folder / CONFIG_FILE, folder / FROZEN_FILE):
        text = read_file(path)
        if text is None:
            continue
        try:
            found = OmegaConf.to_container(OmegaConf.load(io.StringIO(text.decode())))
        except (ValueError, OSError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
            raise DamagedFile(f"{printable(path)}: not options in YAML ({' '.join(str(error).split())})") from error
        if not isinstance(found, dict) or not found:
            raise DamagedFile(f"{printable(path)}: holds no options")
        return flat({str(name): value for name, value in found.items() if name not in HYDRAS})
    return {}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by dotted names; lists are not flattened."""
    options: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping) and len(value) > 0
        options |= flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return options
