"""What runs came to: read from their folders, put together over seeds, compared.

    points = group_runs(read_runs(folders))
    points[0].validation.mean, points[0].validation.spread, points[0].parameters.active_experts
    varying_options([point.options for point in points])      # {"model.activation_ratio": [1, 0.5], ...}

A point is what runs have in common that differ in their seed alone; its group is the sweep it belongs to.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.run_folder import find_runs, last_value, read_config, read_metrics, read_reading, read_state
from mone_model.accounting import Parameters, count_flops, count_parameters
from mone_model.config import ModelConfig

RATIO, SEED = "model.activation_ratio", "run.seed"
INCIDENTAL = ("run.", "logging.", "checkpoint.", "resume", "data.index_cache", "data.num_workers", "launch.")
"""Options, by the beginning of their names, that do not make another point of a run."""


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    options: dict[str, Any]
    records: list[dict[str, Any]]
    state: str
    """As `launch.status` has it: complete, stopped, failed, running, not started."""

    @property
    def seed(self) -> int:
        """run.seed."""
        return int(self.options[SEED])

    @property
    def group(self) -> str:
        """The sweep it belongs to; of a run of its own, its name."""
        return str(self.options.get("logging.wandb_group") or self.options["run.name"])

    def series(self, name: str) -> list[tuple[float, float]]:
        """Step and value of each record of a metric."""
        return [(record["step"], record[name]) for record in self.records if record.get(name) is not None]

    def last(self, name: str) -> float | None:
        """The last record of a metric."""
        return last_value(self.records, name)

    @property
    def validation_loss(self) -> float | None:
        """The last one, nats per token."""
        return self.last("validation/loss")

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the run."""
        speeds = [value for _, value in self.series("speed/tokens_per_second")]
        return statistics.median(speeds) if speeds else None

    @property
    def peak_gib(self) -> float | None:
        """Of the fullest rank."""
        return max((value for _, value in self.series("memory/peak_gib")), default=None)

    @cached_property
    def reading(self) -> list[dict[str, Any]]:
        """What it reads of each source; [] if it has not said so."""
        return read_reading(self.folder)

    @cached_property
    def commit(self) -> str:
        """Of the code that trained it."""
        path = self.folder / "environment.json"
        return (json.loads(path.read_text())["commit"] if path.exists() else None) or "unknown"


@dataclass(frozen=True)
class Spread:
    """Of a value over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean; nan without any."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Their sample standard deviation; nan for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        if not self.values:
            return "-"
        return f"{self.mean:.4f}" + (f" ± {self.spread:.4f}" if len(self.values) > 1 else "")


@dataclass(frozen=True)
class Point:
    """Runs that differ in their seed alone."""

    group: str
    name: str
    """What makes it another than the others of its group: activation_ratio=0.5; the group's name if it is alone."""
    series: str
    """Its group and what makes it another, but for the ratio and what follows from the ratio: a line in a chart."""
    runs: tuple[Run, ...]

    @property
    def options(self) -> dict[str, Any]:
        """The runs', but for the seed and what is incidental."""
        return essential(self.runs[0])

    @property
    def complete(self) -> tuple[Run, ...]:
        """The runs whose results count."""
        return tuple(run for run in self.runs if run.state == "complete")

    @property
    def counted(self) -> tuple[Run, ...]:
        """The complete runs; all, where there are none yet."""
        return self.complete or self.runs

    @property
    def validation(self) -> Spread:
        """Validation loss of complete runs, nats per token."""
        return Spread(tuple(run.validation_loss for run in self.complete if run.validation_loss is not None))

    def difference(self, other: "Point") -> Spread:
        """Validation loss over that of the other's run with the same seed, which read the same data in the same order."""
        theirs = {run.seed: run.validation_loss for run in other.complete}
        pairs = [(run.validation_loss, theirs.get(run.seed)) for run in self.complete]
        return Spread(tuple(ours - their for ours, their in pairs if ours is not None and their is not None))

    def mean(self, metric: str) -> float | None:
        """Mean over the counted runs of its last records."""
        values = [value for run in self.counted if (value := run.last(metric)) is not None]
        return statistics.fmean(values) if values else None

    @cached_property
    def model(self) -> ModelConfig:
        """The runs' model."""
        known = {field.name for field in fields(ModelConfig)}
        options = {name.removeprefix("model."): value for name, value in self.options.items() if name.startswith("model.")}
        return ModelConfig(**{name: value for name, value in options.items() if name in known})

    @cached_property
    def parameters(self) -> Parameters:
        """Counted from the configuration."""
        return count_parameters(self.model)

    @cached_property
    def training_flops(self) -> int:
        """Of a token, as dense kernels compute them."""
        return 3 * count_flops(self.model).dense

    @property
    def ratio(self) -> float:
        """model.activation_ratio."""
        return self.model.activation_ratio


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, or in their subfolders; ValueError if there are none."""
    runs = []
    for folder in find_runs(folders):
        if options := read_config(folder):
            runs.append(Run(folder, options, read_metrics(folder), read_state(folder)))
    if not runs:
        raise ValueError(f"{', '.join(map(str, folders))}: no run there has begun, or is queued")
    return runs


def essential(run: Run) -> dict[str, Any]:
    """The options that make a run another point than a run with others."""
    return {name: value for name, value in run.options.items() if not name.startswith(INCIDENTAL)}


def group_runs(runs: Sequence[Run]) -> list[Point]:
    """Put the runs of one group together that differ in their seed alone; in the order of groups, highest ratio first.

    ValueError if two do not even differ in that.
    """
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(json.dumps([run.group, essential(run)], sort_keys=True), []).append(run)
    points = []
    groups = dict.fromkeys(run.group for run in runs)
    for group in groups:
        members = [found for found in alike.values() if found[0].group == group]
        options = [essential(found[0]) for found in members]
        varying = varying_options(options)
        # The width of an expert may follow from its ratio, for instance.
        of_series = [name for name in varying if name != RATIO and not _follows(name, options)]
        named = [name for name in varying if name in of_series or name == RATIO]
        for found, its in zip(members, options, strict=True):
            name = ",".join(f"{_short(key)}={shown(its.get(key))}" for key in named) or group
            series = ",".join([group, *(f"{_short(key)}={shown(its.get(key))}" for key in of_series)])
            found.sort(key=lambda run: run.seed)
            for run, other in zip(found, found[1:], strict=False):
                if run.seed == other.seed:
                    raise ValueError(f"{run.folder} and {other.folder} are the same run, seed {run.seed}: leave one out")
            points.append(Point(group, name, series, tuple(found)))
    order = list(groups)
    return sorted(points, key=lambda point: (order.index(point.group), point.series, -point.ratio))


def varying_options(options: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Options that are not the same in all, with their values."""
    names = dict.fromkeys(name for its in options for name in its)
    values = {name: [its.get(name) for its in options] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def labels(points: Sequence[Point]) -> list[str]:
    """A name for each, unique among them."""
    several = len({point.group for point in points}) > 1
    return [f"{point.group}: {point.name}" if several and point.name != point.group else point.name for point in points]


def baselines(points: Sequence[Point]) -> dict[str, Point]:
    """Of each series the plain MoE, if it has one."""
    return {point.series: point for point in points if point.ratio == 1}


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
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _short(name: str) -> str:
    return name.rpartition(".")[2]
