"""Results of one run (`Run`), and of the runs that differ only in their seed (`Point`).

run.validation_loss, run.last("expert/load_max"), run.series("train/loss")
point.validation.mean, point.validation.spread, point.parameters.active_experts
"""

import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from mone_common.checks import is_number
from mone_common.run_records import last_value
from mone_common.text import printable
from mone_model.accounting import Flops, Parameters, count_parameters, count_training_flops
from mone_model.config import ModelConfig

RATIO = "model.activation_ratio"
UNDISTURBED, TRAINED = "speed/undisturbed_tokens_per_second", "train/trained_tokens"
"""Metrics of a record: `Run.undisturbed_speed` and `Run.trained_tokens`."""
SEEDS = ("run.seed", "data.seed")
"""Options with seeds; null means: equal to the first."""
INCIDENTAL = (
    *("run.", "logging.", "checkpoint.", "resume", "evaluation.interval", "evaluation.text", "launch."),
    *("data.index_cache", "data.num_workers", "data.seed"),
)
"""Prefixes of options that may differ between the runs of one point."""


@dataclass(frozen=True)
class Evaluation:
    """The losses of a model on the documents of a text, by `mone-evaluate`."""

    sha256: str
    """Identifies the documents and their order."""
    sources: list[tuple[str, int]]
    """Name and number of documents of each source, in order."""
    tokens: list[int]
    """Scored tokens of each document."""
    nll: list[float]
    """Summed negative log-likelihood of each document, nats."""

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of a token."""
        return math.fsum(self.nll) / sum(self.tokens)


@dataclass(frozen=True)
class Run:
    """One run folder, or its record (`launch.recorded`)."""

    folder: Path
    """Folder of the run, or file of the record."""
    options: dict[str, Any]
    records: list[dict[str, Any]]
    state: str
    """complete, stopped, failed, running or not started, as in `launch.status`."""
    reading: list[dict[str, Any]] = field(default_factory=list)
    """Tokens that the run reads from each source (`read_reading`); [] if not recorded."""
    commit: str = "unknown"
    """Git commit of the code that trained the run."""
    processor: str | None = None
    """Model and vector instructions of the processor; None if not recorded."""
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    """Evaluations of text by name."""
    evaluation: str | None = None
    """The evaluation whose loss is reported; None: the validation loss of training."""
    tuned: Mapping[str, Any] = field(default_factory=dict)
    """Options that were chosen for this point by other runs (`launch.tuning`); they are not among `options`."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Values of the options SEEDS."""
        first = self.options[SEEDS[0]]
        return tuple(first if (value := self.options.get(name)) is None else value for name in SEEDS)

    @property
    def seed(self) -> str:
        """The distinct seeds as text."""
        return ", ".join(dict.fromkeys(map(str, self.seeds)))

    @property
    def name(self) -> str:
        """Value of run.name."""
        return printable(self.options["run.name"])

    @property
    def group(self) -> str:
        """Name of the sweep; empty for a run that is not part of one."""
        return printable(self.options.get("logging.wandb_group") or "")

    def series(self, name: str, over: str = "step") -> list[tuple[float, float]]:
        """Pairs (value of `over`, value of the metric), one for each record that has both."""
        return [
            (record[over], record[name])
            for record in self.records
            if is_number(record.get(name)) and is_number(record.get(over))
        ]

    def last(self, name: str) -> float | None:
        """The last recorded value of a metric."""
        return last_value(self.records, name)

    @property
    def validation_loss(self) -> float | None:
        """Nats per token: the last validation loss, or that of `evaluation`; None if there is none or it is not finite."""
        if self.evaluation is not None:
            loss = self.documents.nats_per_token if self.documents is not None else math.nan
            return loss if math.isfinite(loss) else None
        found = [record["validation/loss"] for record in self.records if "validation/loss" in record]
        return found[-1] if found and is_number(found[-1]) else None

    @property
    def documents(self) -> Evaluation | None:
        """Losses of the documents of `evaluation`."""
        return None if self.evaluation is None else self.evaluations.get(self.evaluation)

    @property
    def tokens_per_second(self) -> float | None:
        """Median speed over the run."""
        speeds = [value for _, value in self.series("speed/tokens_per_second")]
        return statistics.median(speeds) if speeds else None

    @property
    def trained_tokens(self) -> float | None:
        """Tokens that the run trained on; those of the source of a branch (`init.branch`) are not among them."""
        if (recorded := self.last(TRAINED)) is not None:
            return recorded
        counts = [value for _, value in self.series("train/tokens")]
        return counts[-1] - (counts[0] if self.options.get("init.branch") else 0) if counts else None

    @property
    def seconds(self) -> float | None:
        """Seconds of training at the median speed."""
        tokens, speed = self.trained_tokens, self.tokens_per_second
        return None if tokens is None or speed is None else tokens / speed

    @property
    def undisturbed_speed(self) -> float | None:
        """Tokens per second that a tenth of the records exceed: the speed while the machine does little else."""
        if (recorded := self.last(UNDISTURBED)) is not None:
            return recorded
        speeds = sorted(value for _, value in self.series("speed/tokens_per_second"))
        return speeds[int(0.9 * (len(speeds) - 1))] if speeds else None

    @property
    def undisturbed_seconds(self) -> float | None:
        """Seconds of training at that speed."""
        tokens, speed = self.trained_tokens, self.undisturbed_speed
        return None if tokens is None or speed is None else tokens / speed

    @property
    def peak_gib(self) -> float | None:
        """Peak memory of the rank that uses most, GiB."""
        return max((value for _, value in self.series("memory/peak_gib")), default=None)


@dataclass(frozen=True)
class Spread:
    """Values of one quantity over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean; nan without values."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation; nan for fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        if not self.values:
            return "-"
        return f"{self.mean:.4f}" + (f" ± {self.spread:.4f}" if len(self.values) > 1 else "")


@dataclass(frozen=True)
class Point:
    """Runs that differ only in their seed."""

    group: str
    """Name of the sweep; empty for runs that are not part of one."""
    name: str
    """The options that differ within the sweep, e.g. activation_ratio=0.5; the sweep's name if it has one point; the names
    of the runs if they are not part of a sweep."""
    series: str
    """Points of one series differ only in the ratio and in options that follow from it; a series is a line in a chart."""
    runs: tuple[Run, ...]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the runs without the seed and the other INCIDENTAL options."""
        return essential(self.runs[0])

    @property
    def complete(self) -> tuple[Run, ...]:
        """The complete runs."""
        return tuple(run for run in self.runs if run.state == "complete")

    @property
    def counted(self) -> tuple[Run, ...]:
        """The complete runs, or all runs if none is complete."""
        return self.complete or self.runs

    @property
    def validation(self) -> Spread:
        """Validation losses of the complete runs, nats per token."""
        return Spread(tuple(run.validation_loss for run in self.complete if run.validation_loss is not None))

    def difference(self, other: "Point") -> Spread:
        """Validation loss minus the other point's, for each pair of runs with the same seeds.

        Runs with the same seeds read the same data in the same order.
        """
        theirs = {run.seeds: run.validation_loss for run in other.complete}
        pairs = [(run.validation_loss, theirs.get(run.seeds)) for run in self.complete]
        return Spread(tuple(ours - their for ours, their in pairs if ours is not None and their is not None))

    def mean(self, metric: str) -> float | None:
        """Mean of the metric's last value over the counted runs."""
        values = [value for run in self.counted if (value := run.last(metric)) is not None]
        return statistics.fmean(values) if values else None

    def layers(self, metric: str) -> int:
        """Number of layers for which a metric was recorded."""
        names = set[str]().union(*(record for run in self.counted for record in run.records))
        return next(layer for layer in itertools.count() if f"{metric}/layer_{layer:02d}" not in names)

    @cached_property
    def model(self) -> ModelConfig:
        """Model of the runs."""
        return model_of(self.options)

    @cached_property
    def parameters(self) -> Parameters:
        """Parameter counts of the model."""
        return count_parameters(self.model)

    @cached_property
    def training_flops(self) -> Flops:
        """Training FLOPs per token."""
        return count_training_flops(self.model, self.options.get("training.steps"))

    @property
    def ratio(self) -> float:
        """Value of model.activation_ratio."""
        return self.model.activation_ratio


def model_of(options: dict[str, Any]) -> ModelConfig:
    """The model that the options describe; ValueError or TypeError if they are invalid."""
    known = {field.name for field in fields(ModelConfig)}
    of_model = {name.removeprefix("model."): value for name, value in options.items() if name.startswith("model.")}
    return ModelConfig(**{name: value for name, value in of_model.items() if name in known})


def essential(run: Run) -> dict[str, Any]:
    """The options that must be equal in all runs of a point."""
    return {name: value for name, value in run.options.items() if not name.startswith(INCIDENTAL)}
