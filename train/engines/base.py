"""What an engine does, and what the engines share: the loss, the learning-rate schedule, the form of a saved state."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from train.config_sections import OptimizerConfig
from train.sources import Batch

Accept = Callable[[float, float], bool]
"""Says, given the loss and the gradient norm of a step, whether the step may change the weights."""

# The form in which weights and optimizer state move between layouts and engines.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean cross-entropy of the global batch, in nats per token."""
    grad_norm: float
    """L2 norm of the gradient over all parameters, before clipping."""
    learning_rate: float
    """The rate that this step used."""
    applied: bool
    """Whether the weights changed."""


class Engine(Protocol):
    """The model of this rank, its optimizer and its schedule; every verb is a collective on every rank."""

    modules: list[GPTModel]
    """The bare model chunks of this rank, one for each virtual pipeline stage."""

    def train_step(self, batches: Iterator[Batch], *, micro_batches: int, accept: Accept) -> StepResult:
        """One optimizer step over the next micro_batches.

        accept: is asked with the loss and the norm before anything changes. A step that it refuses leaves weights and
        optimizer as they were; only the learning-rate schedule goes on.
        """
        ...

    def evaluate(self, batches: Iterator[Batch], *, micro_batches: int) -> float:
        """Mean cross-entropy of the next micro_batches in nats per token, without training."""
        ...

    def sharded_state(self, *, loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule in Megatron-Core's sharded form: to save, or (loading) to be filled.

        The form is the same for every engine and layout: docs/checkpoints.md.
        """
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `dist_checkpointing.load` filled `sharded_state(loading=True)` with."""
        ...


def sums_of_losses(mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss in nats, with a gradient, and the number of tokens that count."""
    return (losses_BS.float() * mask_BS).sum(), mask_BS.sum()


def make_scheduler(section: OptimizerConfig, steps: int, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron-Core's schedule of the learning rate over anything with `param_groups`."""
    last = section.decay_steps or steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=last,
        lr_decay_style="WSD" if section.schedule == "wsd" else section.schedule,
        wsd_decay_steps=section.wsd_decay_steps or max(1, last // 10),
        lr_wsd_decay_style="linear",
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # The config rules: a resumed run may stretch its schedule.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate(section: OptimizerConfig, steps: int, step: int) -> float:
    """The rate that `make_scheduler`'s schedule gives a step, counted from 1."""
    group = {"lr": 0.0, "weight_decay": 0.0}
    make_scheduler(section, steps, SimpleNamespace(param_groups=[group])).step(increment=step)
    return group["lr"]
