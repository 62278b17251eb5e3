"""Typed and checked facts about the run that wrote a checkpoint, from its manifest. Imports no torch.

facts = read_facts(checkpoint)                 # also of earlier versions; ValueError for an invalid fact
facts.samples, facts.model["hidden_size"], facts.optimizer
manifest |= facts.to_dict()
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from mone_common.checkpoint_folder import Checkpoint
from mone_common.checks import is_number
from mone_common.text import excerpt
from mone_model.config import EXPERT_BACKENDS
from train.config_sections import OptimizerConfig

VERSION = 1
"""Version of the facts. Later versions can add facts, which earlier readers ignore."""
LARGEST_BATCH = 2**20
"""Largest plausible number of samples per step; more means that the manifest is damaged."""
REQUIRED = ("model", "precision", "order", "samples", "parallel", "guard", "world_size")
"""Facts that all versions write."""
EARLIER_BACKENDS = {"skip": "sparse"}
"""Earlier names of values of `experts`."""


@dataclass(frozen=True)
class CheckpointFacts:
    """Facts about a run that each of its checkpoints stores, for a resume."""

    world_size: int
    """Number of processes."""
    samples: int
    """Training sequences read since the run began."""
    model: dict[str, Any]
    """The `model` section of its configuration."""
    parallel: dict[str, Any]
    """The `parallel` section."""
    precision: str
    """`compute.precision`."""
    order: dict[str, Any]
    """Order of samples, from `train.sample_order.plan_order`."""
    guard: dict[str, Any]
    """State of the `StepGuard`."""
    seed: int
    """`run.seed`; in earlier versions the seed of the sample order."""
    engine: str = "megatron"
    """Training engine."""
    experts: str = "auto"
    """Chosen value of `compute.experts`; auto in earlier versions."""
    run: str | None = None
    """Id of the run. Earlier versions have None here and in the next three fields."""
    wandb_id: str | None = None
    """Id of the W&B run; None if there is none."""
    optimizer: dict[str, Any] | None = None
    """The `optimizer` section."""
    steps: int | None = None
    """`training.steps`."""
    initial: dict[str, Any] | None = None
    """Where the run's first weights came from (`train.initial_source`); None: they were random."""
    version: int = VERSION
    """Version of the facts; 0: written before the facts had a version."""

    @classmethod
    def from_dict(cls, noted: dict[str, Any], *, step: int) -> "CheckpointFacts":
        """The facts in the manifest of a checkpoint of this step; ValueError for a missing or invalid fact.

        Other entries of the manifest are ignored.
        """
        if missing := sorted(set(REQUIRED) - noted.keys()):
            raise ValueError(f"not a checkpoint of a run: its manifest lacks {', '.join(missing)}")
        names = [field.name for field in dataclasses.fields(cls)]
        found = {name: noted[name] for name in names if name in noted}
        found = {"version": 0, "seed": _seed_of(found["order"]), "experts": "auto"} | found
        if isinstance(found["experts"], str):
            found["experts"] = EARLIER_BACKENDS.get(found["experts"], found["experts"])
        facts = cls(**found)
        if wrong := facts._wrong(step):
            raise ValueError(f"damaged: its manifest has an invalid value of {wrong}: {excerpt(noted.get(wrong))}")
        return facts

    def to_dict(self) -> dict[str, Any]:
        """The facts as entries of the manifest."""
        return dataclasses.asdict(self)

    def _wrong(self, step: int) -> str | None:
        """The name of a fact that is invalid for a checkpoint of this step, or None."""
        sound = {
            "version": is_count(self.version),
            "world_size": is_count(self.world_size) and self.world_size > 0,
            "model": isinstance(self.model, dict),
            "parallel": isinstance(self.parallel, dict),
            "precision": isinstance(self.precision, str),
            "engine": self.engine in ("megatron", "deepspeed"),
            "experts": self.experts in ("auto", *EXPERT_BACKENDS),
            "samples": is_count(self.samples) and step <= self.samples <= step * LARGEST_BATCH,
            "order": _is_order(self.order) and is_count(self.samples) and self.order["start"] <= self.samples,
            "seed": type(self.seed) is int,
            "guard": _is_guard(self.guard) and all(dropped <= step for dropped in self.guard["dropped"]),
            "wandb_id": isinstance(self.wandb_id, str | None),
            "run": isinstance(self.run, str | None),
            "initial": isinstance(self.initial, dict | None),
            "optimizer": self.optimizer is None or _is_optimizer(self.optimizer, self.steps),
        }
        return next((name for name, is_sound in sound.items() if not is_sound), None)


def read_facts(checkpoint: Checkpoint) -> CheckpointFacts:
    """The facts in the manifest of a checkpoint; ValueError for a missing or invalid fact."""
    return CheckpointFacts.from_dict(checkpoint.noted, step=checkpoint.step)


def _seed_of(order: Any) -> Any:
    return order.get("seed") if isinstance(order, dict) else None


def is_count(value: Any) -> bool:
    """Whether the value is an integer >= 0."""
    return type(value) is int and value >= 0


def _is_guard(guard: Any) -> bool:
    return (
        isinstance(guard, dict)
        and isinstance(guard.get("dropped"), list)
        and all(map(is_count, guard["dropped"]))
        and isinstance(guard.get("recent"), list)
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in guard["recent"])
    )


def _is_optimizer(options: Any, steps: Any) -> bool:
    if not (isinstance(options, dict) and is_count(steps) and steps > 0):
        return False
    try:
        section = optimizer_of(options)
    except (TypeError, ValueError):
        return False
    warmup, end = section.warmup_steps, section.decay_steps or steps
    return warmup is not None and all(map(is_count, (warmup, end, section.wsd_decay_steps or 1))) and warmup < end


def optimizer_of(options: dict[str, Any]) -> OptimizerConfig:
    """The `optimizer` section of a checkpoint's facts as a dataclass; options unknown to this version are ignored."""
    known = {field.name for field in dataclasses.fields(OptimizerConfig)}
    return OptimizerConfig(**{name: value for name, value in options.items() if name in known})


def _is_order(order: Any) -> bool:
    if not (isinstance(order, dict) and is_count(order.get("start")) and type(order.get("seed")) is int):
        return False
    sources, earlier = order.get("sources"), order.get("earlier")
    if not (isinstance(sources, list) and sources and isinstance(earlier, list)):
        return False
    return all(
        isinstance(source, dict)
        and isinstance(source.get("name"), str)
        and isinstance(source.get("content"), str)
        and is_number(source.get("weight"))
        and source["weight"] > 0
        and is_count(source.get("read"))
        for source in sources + earlier
    )
