"""What one run came to, and what runs came to that differ in their seed alone.

run.validation_loss, run.last("expert/load_max"), run.series("train/loss")
point.validation.mean, point.validation.spread, point.parameters.active_experts
"""

import itertools
import json
import math
import statistics
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from mone_common.run_folder import read_file
from mone_common.run_records import is_number, last_value
from mone_common.text import printable
from mone_model.accounting import Parameters, count_flops, count_parameters
from mone_model.config import ModelConfig

RATIO = "model.activation_ratio"
SEEDS = ("run.seed", "data.seed")
"""A seed that is null is the first one."""
INCIDENTAL = (
    *("run.", "logging.", "checkpoint.", "resume", "evaluation.interval", "launch."),
    *("data.index_cache", "data.num_workers", "data.seed"),
)
"""Options, by the beginning of their names, that do not make another point of a run."""


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    options: dict[str, Any]
    records: list[dict[str, Any]]
    state: str
    """As `launch.status` has it: complete, stopped, failed, running, not started."""
    reading: list[dict[str, Any]] = field(default_factory=list)
    """What it reads of each source (`read_reading`); [] if it has not said so."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """SEEDS."""
        first = self.options[SEEDS[0]]
        return tuple(first if (value := self.options.get(name)) is None else value for name in SEEDS)

    @property
    def seed(self) -> str:
        """SEEDS as text: the first, and another where it differs."""
        return ", ".join(dict.fromkeys(map(str, self.seeds)))

    @property
    def name(self) -> str:
        """run.name."""
        return printable(self.options["run.name"])

    @property
    def group(self) -> str:
        """The sweep it belongs to; of a run made by itself, nothing."""
        return printable(self.options.get("logging.wandb_group") or "")

    def series(self, name: str, over: str = "step") -> list[tuple[float, float]]:
        """Each record of a metric: the step, or what else it is taken over, and its value."""
        return [
            (record[over], record[name])
            for record in self.records
            if is_number(record.get(name)) and is_number(record.get(over))
        ]

    def last(self, name: str) -> float | None:
        """The last record of a metric."""
        return last_value(self.records, name)

    @property
    def validation_loss(self) -> float | None:
        """The last one, nats per token; None also where that was not finite."""
        found = [record["validation/loss"] for record in self.records if "validation/loss" in record]
        return found[-1] if found and is_number(found[-1]) else None

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
    def commit(self) -> str:
        """Of the code that trained it."""
        try:
            found = json.loads(read_file(self.folder / "environment.json") or b"{}")
        except (ValueError, RecursionError):
            found = None
        return printable(found.get("commit") or "unknown") if isinstance(found, dict) else "unknown"


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
    """The sweep it belongs to; nothing where its runs were made one by one."""
    name: str
    """What makes it another than the others of its group: activation_ratio=0.5; the group's name if it is alone; the names
    of runs made one by one."""
    series: str
    """What it has in common with those that differ in the ratio, and in what follows from the ratio: a line in a chart."""
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
        """Validation loss over that of the other's run with the same seeds, which read the same data in the same order."""
        theirs = {run.seeds: run.validation_loss for run in other.complete}
        pairs = [(run.validation_loss, theirs.get(run.seeds)) for run in self.complete]
        return Spread(tuple(ours - their for ours, their in pairs if ours is not None and their is not None))

    def mean(self, metric: str) -> float | None:
        """Mean over the counted runs of its last records."""
        values = [value for run in self.counted if (value := run.last(metric)) is not None]
        return statistics.fmean(values) if values else None

    def layers(self, metric: str) -> int:
        """Layers of which a metric was recorded, from the first."""
        names = set[str]().union(*(record for run in self.counted for record in run.records))
        return next(layer for layer in itertools.count() if f"{metric}/layer_{layer:02d}" not in names)

    @cached_property
    def model(self) -> ModelConfig:
        """The runs' model."""
        return model_of(self.options)

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


def model_of(options: dict[str, Any]) -> ModelConfig:
    """The model that options describe; ValueError or TypeError if they describe none."""
    known = {field.name for field in fields(ModelConfig)}
    of_model = {name.removeprefix("model."): value for name, value in options.items() if name.startswith("model.")}
    return ModelConfig(**{name: value for name, value in of_model.items() if name in known})


def essential(run: Run) -> dict[str, Any]:
    """The options that make a run another point than a run with others."""
    return {name: value for name, value in run.options.items() if not name.startswith(INCIDENTAL)}
