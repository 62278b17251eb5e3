"""The sections of a run's configuration, one dataclass each, which checks its own fields.

Rules that span sections or need the world size are those of `train.config_rules`.
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
    """ValueError unless this can be the name of a run: the names of folders, each within the one before."""
    good = name.isprintable() and all(
        part.strip() not in ("", ".", "..") and not part.startswith("-") and len(part.encode()) <= 255
        for part in name.split("/")
    )
    check(
        good,
        "run.name",
        name if name.isprintable() else repr(name),
        "names a folder below runs/: not empty, no . or .., no - at the front, no control characters, at most 255 bytes; "
        "another place is given by run.dir",
    )


@dataclass
class ExecutionConfig:
    """Where the run lives."""

    name: str = "mone"
    """Name of the run, also in W&B."""
    dir: str = "runs/${run.name}"
    """Folder of the run: composed config, environment, metrics, checkpoints, figures."""
    seed: int = 1234
    """Of initial weights, dropout and, unless data.seed is given, the order of training samples."""
    stop_at_step: int | None = None
    """Save and stop after this step, as a signal would; the same command without it continues."""
    time_limit: str | None = None
    """Save and stop before the processes have run so long, as HH:MM:SS or D-HH:MM:SS; null: no limit."""
    timeout_minutes: float = 30.0
    """How long a rank may stay in one phase of a step before the run is ended and the silent rank named."""

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
        """`time_limit` in seconds; infinite without one."""
        if self.time_limit is None:
            return math.inf
        match = TIME_LIMIT.fullmatch(self.time_limit)
        assert match is not None
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass
class TrainingConfig:
    """How long and in what batches."""

    steps: int = 1000
    """Optimizer steps."""
    micro_batch_size: int = 4
    """Sequences that one data-parallel rank computes at a time."""
    global_batch_size: int = 32
    """Sequences of one optimizer step over all ranks."""

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
    """cosine, linear, wsd (warm up, stay, decay) or constant."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; null: 100, and at most a tenth of the steps until the decay ends."""
    decay_steps: int | None = None
    """Step at which min_lr is reached; null: training.steps."""
    wsd_decay_steps: int | None = None
    """Steps of the final decay of wsd; null: a tenth of decay_steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms are exempt."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0: no clipping."""

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
    """What only the DeepSpeed engine reads."""

    zero_stage: int = 1
    """ZeRO: what data-parallel ranks share out among them. 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory and update the weights there."""
    options: dict[str, Any] = field(default_factory=dict)
    """More of DeepSpeed's own configuration, laid over what the engine asks for, e.g.
    'deepspeed.options={zero_optimization: {reduce_bucket_size: 1e8}}'. What the other sections say is refused here."""

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
    """One source of the blend: a folder that mone-tokenize wrote."""

    path: str = MISSING
    """The folder with manifest.json."""
    weight: float | None = None
    """Share in the blend, relative to the others'; null on all: in proportion to their tokens."""


@dataclass
class DataConfig:
    """What is read."""

    blend: list[SourceConfig] = field(default_factory=list)
    """Sources and weights, e.g. 'data.blend=[{path: data/a, weight: 0.7}, {path: data/b, weight: 0.3}]'."""
    seed: int | None = None
    """Of the order of training samples; null: run.seed. Validation reads the same sequences whatever the seeds."""
    index_cache: str = "${run.dir}/index_cache"
    """Where the order of large sources is kept between runs; runs may share it. Safe to delete when no run reads it."""
    num_workers: int = 0
    """Reader processes of each rank; 0 reads in the training process."""

    def __post_init__(self) -> None:
        check_least("data", self, 0, "num_workers")
        check(self.seed is None or self.seed >= 0, "data.seed", self.seed, "must be null or at least 0")
        for source in self.blend:
            check(source.path != MISSING, "data.blend", self.blend, "every source needs a path")
            check(source.weight is None or source.weight > 0, f"weight of {source.path}", source.weight, "must be positive")


@dataclass
class EvaluationConfig:
    """Validation, on each source on its own."""

    interval: int = 100
    """Steps between validations; 0: only at the end."""
    sequences: int = 64
    """Validation sequences of each source, at most."""

    def __post_init__(self) -> None:
        check_least("evaluation", self, 0, "interval")
        check_least("evaluation", self, 1, "sequences")


@dataclass
class CheckpointConfig:
    """When the run is saved."""

    interval: int = 200
    """Steps between checkpoints; one more is written at the end. 0: only at the end."""
    keep_last: int = 2
    """Checkpoints that stay; older ones are deleted after a new one is complete."""
    keep_every: int | None = None
    """Checkpoints at multiples of this step stay for ever; null: none."""
    async_save: bool = False
    """Write in the background while training goes on; the checkpoint exists when it is completely on disk."""
    trust: bool = False
    """Load a checkpoint even if it brings pickled code along, which loading then executes."""

    def __post_init__(self) -> None:
        check_least("checkpoint", self, 0, "interval")
        check_least("checkpoint", self, 1, "keep_last")
        every = self.keep_every
        check(every is None or every >= 1, "checkpoint.keep_every", every, "must be null or at least 1")


@dataclass
class GuardConfig:
    """Steps that must not change the weights."""

    max_dropped: int = 10
    """A step whose loss or gradient is not finite is dropped; more than this many in `window` steps end the run."""
    window: int = 1000
    """Steps over which dropped ones are counted."""
    spike_sigma: float | None = None
    """Also drop a step whose loss or gradient norm is this many standard deviations above the mean of the last
    `spike_window` steps (6 is usual); null: never."""
    spike_window: int = 128
    """Steps from which that mean and deviation are taken; half of them must have been seen."""

    def __post_init__(self) -> None:
        check_least("guard", self, 0, "max_dropped")
        check_least("guard", self, 1, "window")
        check_least("guard", self, 4, "spike_window")
        sigma = self.spike_sigma
        check(sigma is None or sigma > 0, "guard.spike_sigma", sigma, "must be null or positive")


@dataclass
class LoggingConfig:
    """What is recorded, and where to. docs/metrics.md explains every name."""

    interval: int = 10
    """Steps between records of loss, auxiliary losses, learning rate, speed."""
    neuron_interval: int = 50
    """Steps between records of expert load and neuron statistics, which count all tokens in between; 0: never, and then
    there are no heatmaps and histograms either."""
    figure_interval: int = 200
    """Steps between heatmaps and histograms; 0: only at the end. A multiple of neuron_interval."""
    wandb_mode: str = "offline"
    """offline (upload later with `wandb sync`), online, or disabled."""
    wandb_project: str = "mone"
    """W&B project. W&B takes 128 characters for this and the next two, and none of / \\ # ? % : in a project or entity."""
    wandb_entity: str | None = None
    """W&B team or user; null: the default of the login."""
    wandb_group: str | None = None
    """Runs of one group are shown together; null: none. A sweep sets its own name."""

    def __post_init__(self) -> None:
        modes = ("offline", "online", "disabled")
        check(self.wandb_mode in modes, "logging.wandb_mode", self.wandb_mode, f"choose from {', '.join(modes)}")
        check_least("logging", self, 1, "interval")
        check_least("logging", self, 0, "neuron_interval", "figure_interval")
        if self.wandb_mode != "disabled":
            self._check_wandb_names()

    def _check_wandb_names(self) -> None:
        # W&B refuses a wrong project when it starts, which is hours later in a queue, and then keeps no record of the run.
        for name in ("wandb_project", "wandb_entity", "wandb_group"):
            value = getattr(self, name)
            option, forbidden = f"logging.{name}", "" if name == "wandb_group" else "/\\#?%:"
            if value is None:
                continue
            check(value.strip() != "", option, repr(value), "must not be empty; leave it out for the default")
            check(len(value) <= 128, option, repr(value), f"has {len(value)} characters, and W&B takes 128")
            found = [character for character in value if character in forbidden or not character.isprintable()]
            none_of = f"none of {' '.join(forbidden)} and " if forbidden else ""
            check(not found, option, repr(value), f"W&B takes {none_of}no control characters in it")
