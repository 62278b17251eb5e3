"""The sections of a run's configuration. Each section is a dataclass that checks its own fields.

`train.config_rules` checks rules that span sections or need the world size.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from mone_common.checks import check

TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


def check_least(section: str, config: object, least: int, *names: str) -> None:
    """ValueError unless each named option is at least `least`."""
    for name in names:
        value = getattr(config, name)
        check(value >= least, f"{section}.{name}", value, f"must be at least {least}")


def check_name(name: str) -> None:
    """ValueError unless `name` is a valid run name: a relative path without `.` and `..`."""
    good = name.isprintable() and all(
        part.strip() not in ("", ".", "..") and not part.startswith("-") and len(part.encode()) <= 255
        for part in name.split("/")
    )
    check(
        good,
        "run.name",
        name if name.isprintable() else repr(name),
        "names a folder below runs/: not empty, no . or .., no - at the front, no control characters, at most 255 bytes; "
        "use run.dir for another location",
    )


@dataclass
class ExecutionConfig:
    """Name, folder, seed and limits of the run."""

    name: str = "mone"
    """Name of the run, here and in W&B."""
    dir: str = "runs/${run.name}"
    """Run folder: holds the composed config, environment, metrics, checkpoints and figures."""
    seed: int = 1234
    """Seed of the initial weights and of dropout. Also of the order of training samples, unless data.seed is given."""
    stop_at_step: int | None = None
    """Save a checkpoint and stop after this step. Run the same command without this option to continue."""
    time_limit: str | None = None
    """Save a checkpoint and stop before this much time has passed, as HH:MM:SS or D-HH:MM:SS; null: no limit."""
    timeout_minutes: float = 30.0
    """Longest time in minutes that a rank may spend in one phase of a step. A run that exceeds it is ended, and the error
    names the rank that hangs."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check(
            self.dir.strip() != "" and self.dir.isprintable(),
            "run.dir",
            repr(self.dir),
            "must be the path of a folder, without control characters, e.g. run.dir=runs/mine",
        )
        check_least("run", self, 0, "seed")
        check(self.timeout_minutes > 0, "run.timeout_minutes", self.timeout_minutes, "must be positive")
        check(
            self.time_limit is None or TIME_LIMIT.fullmatch(self.time_limit) is not None,
            "run.time_limit",
            self.time_limit,
            "must be null, HH:MM:SS or D-HH:MM:SS, e.g. run.time_limit=23:50:00",
        )

    @property
    def time_limit_seconds(self) -> float:
        """`time_limit` in seconds; infinity if it is null."""
        if self.time_limit is None:
            return math.inf
        match = TIME_LIMIT.fullmatch(self.time_limit)
        assert match is not None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass
class TrainingConfig:
    """Number of steps and batch sizes."""

    steps: int = 1000
    """Optimizer steps."""
    micro_batch_size: int = 4
    """Sequences per micro-batch of one data-parallel rank."""
    global_batch_size: int = 32
    """Sequences per optimizer step, over all ranks."""

    def __post_init__(self) -> None:
        check_least("training", self, 1, "steps", "micro_batch_size", "global_batch_size")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-3
    """Peak learning rate."""
    min_lr: float = 1e-4
    """Learning rate at the end of the decay."""
    schedule: str = "cosine"
    """Learning-rate schedule: cosine, linear, wsd (warmup-stable-decay) or constant."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; null: 100, or a tenth of the steps until the decay ends if that is less."""
    decay_steps: int | None = None
    """Step at which the learning rate reaches min_lr; null: training.steps."""
    wsd_decay_steps: int | None = None
    """Steps of the final decay of wsd; null: a tenth of decay_steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay; does not apply to norms."""
    beta1: float = 0.9
    """Decay rate of the first moment."""
    beta2: float = 0.95
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Term added to the square root of the second moment, for numerical stability."""
    clip_grad: float = 1.0
    """Gradients with a larger norm are scaled down to this norm; 0: no clipping."""

    def __post_init__(self) -> None:
        choices = ("cosine", "linear", "wsd", "constant")
        check(self.schedule in choices, "optimizer.schedule", self.schedule, f"choose from {', '.join(choices)}")
        check(self.lr > 0, "optimizer.lr", self.lr, "must be positive")
        check(
            0 <= self.min_lr <= self.lr,
            "optimizer.min_lr",
            self.min_lr,
            f"must be between 0 and optimizer.lr={self.lr}",
        )
        warmup = self.warmup_steps
        check(warmup is None or warmup >= 0, "optimizer.warmup_steps", warmup, "must be null or not negative")
        for name in ("clip_grad", "weight_decay"):
            check(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must not be negative")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be positive")
        for name in ("decay_steps", "wsd_decay_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"optimizer.{name}", value, "must be null or at least 1")


@dataclass
class DeepSpeedConfig:
    """Options of the DeepSpeed engine."""

    zero_stage: int = 1
    """ZeRO stage, which sets what is partitioned over the data-parallel ranks. 0: nothing; 1: optimizer state; 2: optimizer
    state and gradients; 3: optimizer state, gradients and weights."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory and update the weights there."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed configuration, merged over that of the engine, e.g.
    'deepspeed.options={zero_optimization: {reduce_bucket_size: 1e8}}'. Settings that other options control are refused."""

    def __post_init__(self) -> None:
        check(self.zero_stage in (0, 1, 2, 3), "deepspeed.zero_stage", self.zero_stage, "choose 0, 1, 2 or 3")
        check(
            not self.offload_optimizer or self.zero_stage > 0,
            "deepspeed.offload_optimizer",
            self.offload_optimizer,
            "needs deepspeed.zero_stage of at least 1",
        )


@dataclass
class SourceConfig:
    """One source of the blend: an output folder of mone-tokenize."""

    path: str = MISSING
    """Folder with manifest.json."""
    weight: float | None = None
    """Relative weight in the blend; null for all sources: in proportion to their tokens."""


@dataclass
class DataConfig:
    """Training and validation data."""

    blend: list[SourceConfig] = field(default_factory=list)
    """Sources and weights, e.g. 'data.blend=[{path: data/a, weight: 0.7}, {path: data/b, weight: 0.3}]'."""
    seed: int | None = None
    """Seed of the order of training samples; null: run.seed. Validation sequences do not depend on seeds."""
    index_cache: str = "${run.dir}/index_cache"
    """Folder for the sample order of large sources. Runs can share it. It can be deleted when no run uses it."""
    num_workers: int = 0
    """Data loader processes per rank; 0: load in the training process."""

    def __post_init__(self) -> None:
        check_least("data", self, 0, "num_workers")
        check(self.seed is None or self.seed >= 0, "data.seed", self.seed, "must be null or at least 0")
        for source in self.blend:
            check(source.path != MISSING, "data.blend", self.blend, "every source needs a path")
            check(source.weight is None or source.weight > 0, f"weight of {source.path}", source.weight, "must be positive")


@dataclass
class EvaluationConfig:
    """Validation, separate for each source."""

    interval: int = 100
    """Steps between validations; 0: only at the end."""
    sequences: int = 64
    """Maximum number of validation sequences per source."""
    text: list[str] = field(default_factory=list)
    """Folders of token shards of other text, whose loss is recorded at each validation as evaluation/loss/NAME: their
    validation split, or their train split if they have no other."""

    def __post_init__(self) -> None:
        check_least("evaluation", self, 0, "interval")
        check_least("evaluation", self, 1, "sequences")


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    interval: int = 200
    """Steps between checkpoints; 0: only at the end. A checkpoint is always written at the end."""
    keep_last: int = 2
    """Number of most recent checkpoints to keep. Older ones are deleted after a new one is complete."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step are never deleted; null: none."""
    async_save: bool = False
    """Write checkpoints in the background while training continues. A checkpoint gets its name when it is complete."""
    trust: bool = False
    """Also load checkpoints that contain pickled code. Loading executes that code: use only with trusted checkpoints."""

    def __post_init__(self) -> None:
        check_least("checkpoint", self, 0, "interval")
        check_least("checkpoint", self, 1, "keep_last")
        every = self.keep_every
        check(every is None or every >= 1, "checkpoint.keep_every", every, "must be null or at least 1")


@dataclass
class GuardConfig:
    """Steps that are dropped: they do not change the weights."""

    max_dropped: int = 10
    """Maximum number of dropped steps in the last `window` steps; more end the run. A step is dropped if its loss or
    gradient is not finite."""
    window: int = 1000
    """Number of recent steps in which dropped steps are counted."""
    spike_sigma: float | None = None
    """Also drop a step whose loss or gradient norm is more than this many standard deviations above the mean of the last
    `spike_window` steps (a usual value is 6); null: do not."""
    spike_window: int = 128
    """Steps over which that mean and standard deviation are taken. Spikes are detected after half as many steps."""

    def __post_init__(self) -> None:
        check_least("guard", self, 0, "max_dropped")
        check_least("guard", self, 1, "window")
        check_least("guard", self, 4, "spike_window")
        sigma = self.spike_sigma
        check(sigma is None or sigma > 0, "guard.spike_sigma", sigma, "must be null or positive")


@dataclass
class LoggingConfig:
    """Metrics, figures and W&B. docs/metrics.md explains the metrics."""

    interval: int = 10
    """Steps between records of loss, auxiliary losses, learning rate and speed."""
    neuron_interval: int = 50
    """Steps between records of expert load and neuron statistics over all tokens since the last record; 0: no records,
    heatmaps or histograms."""
    figure_interval: int = 200
    """Steps between heatmaps and histograms; 0: only at the end. Must be a multiple of neuron_interval."""
    wandb_mode: str = "offline"
    """offline (upload later with `wandb sync`), online, or disabled."""
    wandb_project: str = "mone"
    """W&B project. Project, entity and group have at most 128 characters; project and entity have none of / \\ # ? % :."""
    wandb_entity: str | None = None
    """W&B team or user; null: the default of the login."""
    wandb_group: str | None = None
    """W&B group, which W&B shows together; null: none. A sweep sets it to its own name."""

    def __post_init__(self) -> None:
        modes = ("offline", "online", "disabled")
        check(self.wandb_mode in modes, "logging.wandb_mode", self.wandb_mode, f"choose from {', '.join(modes)}")
        check_least("logging", self, 1, "interval")
        check_least("logging", self, 0, "neuron_interval", "figure_interval")
        if self.wandb_mode != "disabled":
            self._check_wandb_names()

    def _check_wandb_names(self) -> None:
        # W&B refuses an invalid name only when the run starts, which can be after hours in a queue, and then records nothing
        for name in ("wandb_project", "wandb_entity", "wandb_group"):
            value = getattr(self, name)
            option, forbidden = f"logging.{name}", "" if name == "wandb_group" else "/\\#?%:"
            if value is None:
                continue
            check(value.strip() != "", option, repr(value), "must not be empty; leave it out for the default")
            check(len(value) <= 128, option, repr(value), f"has {len(value)} characters; W&B allows at most 128")
            found = [character for character in value if character in forbidden or not character.isprintable()]
            none_of = f"none of {' '.join(forbidden)} and " if forbidden else ""
            check(not found, option, repr(value), f"W&B allows {none_of}no control characters in it")
