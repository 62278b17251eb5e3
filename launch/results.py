"""What runs came to: read from their folders, put together over seeds.

    points = group_runs(read_runs(folders))
    points[0].validation.mean, points[0].validation.spread, points[0].parameters.active_experts
    varying_options([point.options for point in points])      # {"model.activation_ratio": [1, 0.5], ...}

A point is what runs have in common that differ in their seed alone; its group is the sweep it belongs to.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from launch.points import RATIO, SEEDS, Point, Run, essential, model_of
from mone_common.run_folder import CONFIG_FILE, DamagedFile, check_readable, find_runs
from mone_common.run_records import examine_metrics, is_number, read_config, read_reading, read_state
from mone_common.text import printable
from mone_model.accounting import count_parameters

BLEND = "data.blend"


def read_runs(
    folders: Sequence[Path],
    tell: Callable[[str], None] = partial(print, file=sys.stderr),  # noqa: B008
) -> list[Run]:
    """The runs in these folders, or in their subfolders; ValueError if there are none.

    tell: is told of each file that is damaged, and of each run that cannot be read and is left out.
    """
    runs = []
    for folder in find_runs(folders):
        try:
            check_readable(folder)
            options = read_config(folder)
            if not options:
                raise DamagedFile(f"{printable(folder)}: no {CONFIG_FILE}")
            records, problem = examine_metrics(folder)
            run = Run(folder, options, records, read_state(folder), _reading(folder, tell))
            _check(run)
        except DamagedFile as error:
            tell(f"left out {error}")
            continue
        if problem:
            tell(problem)
        runs.append(run)
    if not runs:
        raise ValueError(f"{', '.join(map(printable, folders))}: no run there can be read")
    return runs


def _reading(folder: Path, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    try:
        return read_reading(folder)
    except DamagedFile as error:
        tell(str(error))
        return []


def _check(run: Run) -> None:
    """DamagedFile unless the options are those of a run."""
    try:
        for name in (RATIO, SEEDS[0], "training.steps"):
            if not is_number(run.options.get(name)):
                raise ValueError(f"{name}={run.options.get(name)}: no number")
        if not all(isinstance(seed, int) for seed in run.seeds):
            raise ValueError(f"seeds {run.seed}: no whole numbers")
        if not isinstance(run.options.get("run.name"), str):
            raise ValueError("no run.name")
        count_parameters(model_of(run.options))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise DamagedFile(f"{printable(run.folder)}: its configuration is not of a run ({error})") from error


def comparable(options: dict[str, Any]) -> dict[str, Any]:
    """Options with one spelling for what is the same: no nulls, which an earlier version may not have had; whole paths."""
    found = {name: value for name, value in options.items() if value is not None}
    if isinstance(blend := found.get(BLEND), list):
        found[BLEND] = [
            {**source, "path": os.path.abspath(str(source.get("path")))} if isinstance(source, dict) else source
            for source in blend
        ]
    return found


def group_runs(runs: Sequence[Run]) -> list[Point]:
    """Put the runs of one sweep together that differ in their seed alone, and those made one by one; in the order of groups.

    Highest ratio first. ValueError if two do not even differ in that.
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
    # The width of an expert may follow from its ratio, for instance.
    of_series = [name for name in varying if name != RATIO and not _follows(name, options)]
    named = [name for name in varying if name in of_series or name == RATIO]
    points = []
    for found, its in zip(members, options, strict=True):
        name = ",".join(f"{short_name(key)}={shown(its.get(key))}" for key in named) or group
        series = ",".join([group, *(f"{short_name(key)}={shown(its.get(key))}" for key in of_series)])
        points.append(Point(group, name, series, _by_seed(found)))
    return points


def _points_one_by_one(members: list[list[Run]]) -> list[Point]:
    """Runs that nothing but their names tells apart, such as one repeated, stay apart."""
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
                f"{printable(run.folder)} and {printable(other.folder)} are the same run, seed {run.seed}: leave one out"
            )
    return tuple(ordered)


def _common_name(runs: Sequence[Run]) -> str:
    """plain of plain-1 and plain-2; all names, where they begin differently."""
    names = list(dict.fromkeys(run.name for run in runs))
    return os.path.commonprefix(names).rstrip("-_.,= ") or ", ".join(names)


def varying_options(options: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Options that are not the same in all, with their values."""
    names = dict.fromkeys(name for its in options for name in its)
    values = {name: [its.get(name) for its in options] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def labels(points: Sequence[Point]) -> list[str]:
    """A name for each, unique among them."""
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
    """Whether an option is of the model and follows from the ratio: the same wherever that is the same."""
    seen: dict[Any, Any] = {}
    return (
        name.startswith("model.")
        and len({its[RATIO] for its in options}) > 1
        and all(seen.setdefault(its[RATIO], its.get(name)) == its.get(name) for its in options)
    )


def shown(value: Any) -> str:
    """An option's value as people write it."""
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else printable(value)


def short_name(name: str) -> str:
    """Of an option: its last part."""
    return name.rpartition(".")[2]
