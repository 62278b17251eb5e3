"""Reads runs from their folders and groups them into points over seeds.

    points = group_runs(read_runs(folders))
    points[0].validation.mean, points[0].validation.spread, points[0].parameters.active_experts
    varying_options([point.options for point in points])      # {"model.activation_ratio": [1, 0.5], ...}

A point contains the runs that differ only in their seed. Its group is the sweep that it belongs to.
"""

import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

from launch.points import RATIO, SEEDS, Evaluation, Point, Run, essential, model_of
from launch.recorded import find_records, read_record
from mone_common.checks import is_number
from mone_common.console import UserError
from mone_common.run_folder import CONFIG_FILE, ENVIRONMENT_FILE, DamagedFile, check_readable, find_runs, read_file
from mone_common.run_records import examine_metrics, read_config, read_reading, read_state
from mone_common.text import printable
from mone_eval.results import read_evaluations
from mone_model.accounting import count_parameters
from mone_model.config import ModelConfig
from train.config_init import InitConfig

BLEND = "data.blend"


def read_runs(
    folders: Sequence[Path],
    warn: Callable[[str], None] = partial(print, file=sys.stderr),  # noqa: B008
) -> list[Run]:
    """The runs in these folders or in their subfolders, and those of records; ValueError if there are none.

    folders: also files that `launch.recorded` wrote, and folders of such files.

    warn: called with a message for each damaged file, and for each run that cannot be read and is left out.
    """
    runs = []
    recorded = {folder: find_records(folder) for folder in folders}
    for path in itertools.chain(*recorded.values()):
        try:
            _check(run := read_record(path))
            runs.append(run)
        except DamagedFile as error:
            warn(f"left out {error}")
    without = [folder for folder in folders if not recorded[folder]]
    for folder in find_runs(without) if without or not runs else []:
        try:
            check_readable(folder)
            options = read_config(folder)
            if not options:
                raise DamagedFile(f"{printable(folder)}: no {CONFIG_FILE}")
            records, problem = examine_metrics(folder)
            environment = _environment(folder)
            run = Run(
                folder,
                options,
                records,
                read_state(folder),
                reading=_reading(folder, warn),
                commit=printable(environment.get("commit") or "unknown"),
                processor=environment.get("processor"),
                evaluations=_evaluations(folder, warn),
            )
            _check(run)
        except DamagedFile as error:
            warn(f"left out {error}")
            continue
        if problem:
            warn(problem)
        runs.append(run)
    if not runs:
        raise ValueError(f"{', '.join(map(printable, folders))}: no readable run in it")
    return runs


def _reading(folder: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    try:
        return read_reading(folder)
    except DamagedFile as error:
        warn(str(error))
        return []


def _environment(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_file(folder / ENVIRONMENT_FILE) or b"{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _evaluations(folder: Path, warn: Callable[[str], None]) -> dict[str, Evaluation]:
    """The scores of each text by mone-evaluate, with the losses of its documents."""
    found = {}
    try:
        for name, result in read_evaluations(folder):
            if text := result.get("text"):
                documents = text["documents"]
                sources = itertools.groupby(_source(document["name"]) for document in documents)
                found[name] = Evaluation(
                    text["sha256"],
                    [(source, len(list(its))) for source, its in sources],
                    [document["tokens"] for document in documents],
                    [round(document["nll"], 3) for document in documents],
                )
    except (UserError, KeyError, TypeError) as error:
        warn(str(error))
    return found


def _source(document: str) -> str:
    """The name of a document's token shards or file."""
    path = Path(document.rpartition(":")[0])
    return path.parent.name if re.fullmatch(r"(train|validation)-\d+", path.name) else path.stem


def _check(run: Run) -> None:
    """Raise DamagedFile unless the options are those of a run."""
    try:
        for name in (RATIO, SEEDS[0], "training.steps"):
            if not is_number(run.options.get(name)):
                raise ValueError(f"{name}={run.options.get(name)}: not a number")
        if not all(isinstance(seed, int) for seed in run.seeds):
            raise ValueError(f"seeds {run.seed}: not integers")
        if not isinstance(run.options.get("run.name"), str):
            raise ValueError("no run.name")
        count_parameters(model_of(run.options))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DamagedFile(f"{printable(run.folder)}: not the configuration of a run ({error})") from error


@cache
def _defaults() -> dict[str, Any]:
    """Defaults of the sections that newer versions extend."""
    model, init = asdict(ModelConfig()), asdict(InitConfig())
    return {f"model.{name}": value for name, value in model.items()} | {
        f"init.{name}": value for name, value in init.items()
    }


def comparable(options: dict[str, Any]) -> dict[str, Any]:
    """Options in a canonical form: without nulls, with absolute paths, and with defaults of what older versions lack."""
    found = {name: value for name, value in (_defaults() | options).items() if value is not None}
    if isinstance(blend := found.get(BLEND), list):
        found[BLEND] = [
            {**source, "path": os.path.abspath(str(source.get("path")))} if isinstance(source, dict) else source
            for source in blend
        ]
    return found


def group_runs(runs: Sequence[Run]) -> list[Point]:
    """Group the runs of each sweep, and those outside of sweeps, that differ only in their seed.

    Points are in the order of the groups, the highest ratio first. ValueError if two runs of a point have the same seed.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        key = [run.group, comparable(essential(run))]
        alike.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(run)
    points = []
    groups = dict.fromkeys(run.group for run in runs)
    for group in groups:
        members = [found for found in alike.values() if found[0].group == group]
        points += _points_of_sweep(group, members) if group else _points_one_by_one(members)
    order, series = list(groups), list(dict.fromkeys(point.series for point in points))
    return sorted(
        points,
        key=lambda point: (
            order.index(point.group),
            point.series if point.group else series.index(point.series),
            -point.ratio,
        ),
    )


def _points_of_sweep(group: str, members: list[list[Run]]) -> list[Point]:
    options = [essential(found[0]) for found in members]
    varying = varying_options(options)
    # An option may follow from the ratio, e.g. the width of an expert.
    of_series = [name for name in varying if name != RATIO and not _follows(name, options)]
    named = [name for name in varying if name in of_series or name == RATIO]
    points = []
    for found, its in zip(members, options, strict=True):
        name = ",".join(f"{short_name(key)}={format_value(its.get(key))}" for key in named) or group
        series = ",".join([group, *(f"{short_name(key)}={format_value(its.get(key))}" for key in of_series)])
        points.append(Point(group, name, series, _by_seed(found)))
    return points


def _points_one_by_one(members: list[list[Run]]) -> list[Point]:
    """Points of runs outside of sweeps. Runs with equal options and seeds but different names form separate points."""
    found = []
    for runs in members:
        named: dict[str, list[Run]] = {}
        for run in runs:
            named.setdefault(run.name, []).append(run)
        repeated = len({run.seeds for run in runs}) < len(runs)
        found += [_by_seed(these) for these in (named.values() if repeated else [runs])]
    lines: dict[str, list[tuple[Run, ...]]] = {}
    for these in found:
        rest = {name: value for name, value in comparable(essential(these[0])).items() if name != RATIO}
        lines.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(these)
    return [
        Point("", _common_name(these), ", ".join(map(_common_name, line)), these)
        for line in lines.values()
        for these in line
    ]


def _by_seed(runs: Sequence[Run]) -> tuple[Run, ...]:
    ordered = sorted(runs, key=lambda run: run.seeds)
    for run, other in zip(ordered, ordered[1:], strict=False):
        if run.seeds == other.seeds:
            raise ValueError(
                f"{printable(run.folder)} and {printable(other.folder)} are the same run, seed {run.seed}; leave one out"
            )
    return tuple(ordered)


def _common_name(runs: Sequence[Run]) -> str:
    """The common prefix of the names (plain for plain-1 and plain-2), or all names if they have none."""
    names = list(dict.fromkeys(run.name for run in runs))
    return os.path.commonprefix(names).rstrip("-_.,= ") or ", ".join(names)


def varying_options(options: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The options that differ, each with its values in order."""
    names = dict.fromkeys(name for its in options for name in its)
    values = {name: [its.get(name) for its in options] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def labels(points: Sequence[Point]) -> list[str]:
    """A unique name for each point."""
    several = len({point.group for point in points}) > 1
    found = [
        f"{point.group}: {point.name}" if several and point.group and point.name != point.group else point.name
        for point in points
    ]
    return [
        name if found.count(name) == 1 else f"{name} ({printable(point.runs[0].folder)})"
        for name, point in zip(found, points, strict=True)
    ]


def _follows(name: str, options: Sequence[dict[str, Any]]) -> bool:
    """Whether an option of the model is a function of the ratio: equal ratios have equal values."""
    seen: dict[Any, Any] = {}
    return (
        name.startswith("model.")
        and len({its[RATIO] for its in options}) > 1
        and all(seen.setdefault(its[RATIO], its.get(name)) == its.get(name) for its in options)
    )


def format_value(value: Any) -> str:
    """An option's value as users write it."""
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else printable(value)


def short_name(name: str) -> str:
    """The last part of an option's name."""
    return name.rpartition(".")[2]
