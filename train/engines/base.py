"""The protocol of engines, and their common parts: loss, learning-rate schedule, form of the saved state."""

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
"""Decides from the loss and the gradient norm of a step whether the step may change the weights."""

# The form of weights and optimizer state that all layouts and engines can load.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step; the same on every rank."""

    loss: float
    """Mean cross-entropy of the global batch, in nats per token."""
    grad_norm: float
    """L2 norm of the gradient over all parameters, before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    applied: bool
    """Whether the step changed the weights."""


class Engine(Protocol):
    """The model of this rank, its optimizer and its schedule. All methods are collectives on every rank."""

    modules: list[GPTModel]
    """The unwrapped model chunks of this rank, one for each virtual pipeline stage."""

    def train_step(self, batches: Iterator[Batch], *, micro_batches: int, accept: Accept) -> StepResult:
        """One optimizer step over the next micro_batches.

        accept: called with the loss and the gradient norm before anything changes. If it returns False, weights and
        optimizer state do not change; only the learning-rate schedule advances.
        """
        ...

    def evaluate(self, batches: Iterator[Batch], *, micro_batches: int) -> float:
        """Mean cross-entropy of the next micro_batches in nats per token; does not change the model."""
        ...

    def sharded_state(self, *, loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule as a Megatron-Core sharded state, to save or (loading) to fill.

        The form is the same for all engines and layouts; see docs/checkpoints.md.
        """
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the state that `dist_checkpointing.load` returned for `sharded_state(loading=True)`."""
        ...


def sums_of_losses(mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the losses in nats, with a gradient, and the number of tokens in the mask."""
    return (losses_BS.float() * mask_BS).sum(), mask_BS.sum()


def make_scheduler(section: OptimizerConfig, steps: int, optimizer: Any) -> OptimizerParamScheduler:
    """Megatron-Core's learning-rate schedule for an object with `param_groups`."""
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
        # The config overrides the checkpoint, so that a resumed run can change its schedule.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate(section: OptimizerConfig, steps: int, step: int) -> float:
    """The learning rate of `make_scheduler`'s schedule at a step, counted from 1."""
    group = {"lr": 0.0, "weight_decay": 0.0}
    make_scheduler(section, steps, SimpleNamespace(param_groups=[group])).step(increment=step)
    return group["lr"]
