"""The DeepSpeed engine: ZeRO for the same Megatron-Core model, with Megatron-Core's learning-rate schedule.

engine = DeepSpeedEngine(config, runtime)
result = engine.train_step(batches, micro_batches=8, accept=lambda loss, grad_norm: True)
loss = engine.evaluate(batches, micro_batches=4)
engine.load_state(dist_checkpointing.load(engine.sharded_state(loading=True), folder))

It supports data, expert and expert-tensor parallelism. `register_expert_groups` registers which ranks hold which experts, so
that DeepSpeed does not sum the gradients of different experts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from mone_common.checks import check
from mone_model.megatron.gpt import build_gpt, update_neuron_biases
from mone_model.weight_sources import WeightSource
from train.config import RunConfig
from train.engines.base import SHARDING, Accept, StepResult, make_scheduler, sums_of_losses
from train.engines.deepspeed_config import deepspeed_config
from train.engines.deepspeed_private import (
    MOMENTS,
    create_moments,
    global_norm,
    refresh_partitions,
    register_expert_groups,
    start,
    whole_parameters,
)
from train.runtime import Runtime
from train.sources import Batch


class DeepSpeedEngine:
    """The model of this rank, its optimizer and its schedule.

    `modules` holds the unwrapped model of this rank.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, weights: WeightSource | None = None) -> None:
        self.device, self.stage = runtime.device, config.deepspeed.zero_stage
        self.micro_batches = config.micro_batches(runtime.world_size)
        self.clip_grad = config.optimizer.clip_grad
        self.precise = config.compute.precision == "fp32"
        module = build_gpt(config.model, config.parallel, config.compute, seed=config.run.seed, weights=weights)
        self.modules = [module]
        # Collect the parameters before ZeRO 3 partitions them.
        self.parameters = dict(module.named_parameters())
        expert_group = register_expert_groups(self.parameters.values(), self.stage)
        self.optimizer = _ConditionalAdamW(
            _parameter_groups(self.parameters.values(), config.optimizer.weight_decay, expert_group),
            lr=config.optimizer.lr,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            fused=True,
        )
        self.optimizer.should_step = self._decide
        self.scheduler = make_scheduler(config.optimizer, config.training.steps, self.optimizer)
        self.engine = start(module, self.optimizer, deepspeed_config(config, self.micro_batches))
        create_moments(self.engine, self.optimizer)
        self.accept: Accept = lambda loss, grad_norm: True
        self.loss = math.nan
        self.applied: bool | None = None

    def train_step(self, batches: Iterator[Batch], *, micro_batches: int, accept: Accept) -> StepResult:
        """One optimizer step over the next micro_batches; a collective on every rank.

        A step with a non-finite gradient is never applied. ValueError unless micro_batches has the value of the config.
        """
        check(micro_batches == self.micro_batches, "micro_batches", micro_batches, f"was built for {self.micro_batches}")
        self.engine.train()
        # DeepSpeed divides the loss by the number of micro-batches, but not the auxiliary losses.
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=self.device) / micro_batches)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index in range(micro_batches):
            total, tokens = self._losses(next(batches))
            sums += torch.stack([total.detach(), tokens]).double()
            self.engine.backward(total / tokens.clamp(min=1))
            if index < micro_batches - 1:
                self.engine.step()
        self.loss = _mean(sums)
        self.accept, self.applied = accept, None
        self.scheduler.step(increment=1)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.engine.step()
        grad_norm = self.grad_norm
        if self.applied is None:  # DeepSpeed found a non-finite gradient and did not call the optimizer
            self.accept(self.loss, grad_norm)
            self.applied = False
        megatron = self.modules[0].config
        if self.applied and megatron.moe_router_enable_expert_bias:
            _update_router_expert_bias(self.modules, megatron)
        update_neuron_biases(self.modules, applied=bool(self.applied))
        reset_model_temporary_tensors(megatron, self.modules)
        return StepResult(self.loss, grad_norm, learning_rate, self.applied)

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], *, micro_batches: int) -> float:
        """Mean cross-entropy of the next micro_batches in nats per token; a collective on every rank."""
        self.engine.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for _ in range(micro_batches):
            sums += torch.stack(self._losses(next(batches))).double()
        return _mean(sums)

    @property
    def grad_norm(self) -> float:
        """Norm of the last gradient, before clipping; inf if it was not finite."""
        if self.stage == 0:
            return self.optimizer.grad_norm
        return global_norm(self.engine)

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return sums_of_losses(
            batch["loss_mask"], self.engine(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        )

    def _decide(self) -> bool:
        """Whether to apply this step. DeepSpeed calls the optimizer once for each parameter group."""
        if self.applied is None:
            if self.stage == 0:
                # Without ZeRO the gradient is not clipped yet: DeepSpeed's clipping treats experts as replicas.
                norm = _clip(list(self.parameters.values()), self.clip_grad)
                self.optimizer.grad_norm = norm if math.isfinite(norm) else math.inf
            self.applied = self.accept(self.loss, self.grad_norm) and math.isfinite(self.grad_norm)
        return self.applied

    def sharded_state(self, *, loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule as a Megatron-Core sharded state, to save or (loading) to fill."""
        with whole_parameters(self.parameters, self.stage):
            weights = self.modules[0].sharded_state_dict(metadata=SHARDING)
            names = {id(parameter): name for name, parameter in self.parameters.items()}
            sharded = {names[id(entry.data)]: entry for entry in weights.values() if id(entry.data) in names}
            optimizer: dict[str, Any] = {}
            for kind in self._kinds():
                optimizer[kind] = {
                    name: make_sharded_optimizer_tensor(
                        entry, self._state_of(self.parameters[name], kind).cpu(), f"optimizer.state.{kind}"
                    )
                    for name, entry in sharded.items()
                }
            if self.stage == 3:  # the whole weights are freed when this context ends
                for key, entry in weights.items():
                    if id(entry.data) in names:
                        weights[key] = dataclasses.replace(entry, data=entry.data.detach().clone().cpu())
        step = max((int(state["step"]) for state in self.optimizer.state.values()), default=0)
        return {
            "model0": weights,
            "optimizer": optimizer,
            "optimizer_step": step,
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the state that `dist_checkpointing.load` returned for `sharded_state(loading=True)`."""
        weights, optimizer = state["model0"], state["optimizer"]
        if self.stage < 3:
            self.modules[0].load_state_dict(weights)
        else:
            buffers = {name: value for name, value in weights.items() if name not in self.parameters}
            self.modules[0].load_state_dict(buffers, strict=False)
        for name, parameter in self.parameters.items():
            for kind in self._kinds():
                self._set_state_of(parameter, kind, optimizer[kind][name])
            if self.precise:
                self._set_state_of(parameter, "param", weights[name])
        for of_partition in self.optimizer.state.values():
            of_partition["step"].fill_(state["optimizer_step"])
        if self.stage == 3:
            refresh_partitions(self.engine.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])

    def _kinds(self) -> tuple[str, ...]:
        """The optimizer tensors that are saved for each weight; fp32 weights have no separate master weight."""
        return MOMENTS if self.precise else (*MOMENTS, "param")

    def _state_of(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        """A whole moment or the fp32 master of a weight; a collective on the ranks that partition it."""
        if self.stage == 0:
            return self.optimizer.state[parameter][kind]
        if kind == "param":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _set_state_of(self, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
        if self.stage == 0:
            (parameter.data if kind == "param" else self.optimizer.state[parameter][kind]).copy_(value)
        elif kind == "param":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)


class _ConditionalAdamW(torch.optim.AdamW):
    """AdamW that skips a step if `should_step` returns False. DeepSpeed has reduced and clipped the gradient before."""

    should_step: Callable[[], bool]
    grad_norm = math.nan

    def step(self, closure: Any = None) -> Any:
        return super().step(closure) if self.should_step() else None


def _parameter_groups(parameters: Any, weight_decay: float, expert_group: str) -> list[dict[str, Any]]:
    """Parameter groups as in Megatron-Core: experts are separate, and tensors with one axis have no weight decay."""
    found: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault((not getattr(parameter, "allreduce", True), parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": members,
            "name": expert_group if expert else "dense",
            "moe": expert,
            "wd_mult": float(decays),
            "weight_decay": weight_decay * decays,
        }
        for (expert, decays), members in sorted(found.items(), key=lambda item: item[0])
    ]


def _mean(sums: torch.Tensor) -> float:
    """The mean loss over all ranks, from this rank's sums of losses and tokens."""
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def _clip(parameters: list[torch.nn.Parameter], largest: float) -> float:
    """Clip the reduced gradients in place by their global norm and return the norm; every expert counts once."""
    squares = torch.zeros(2, dtype=torch.float64, device=parameters[0].device)
    for parameter in parameters:
        if parameter.grad is not None:
            squares[int(not getattr(parameter, "allreduce", True))] += parameter.grad.double().square().sum()
    dist.all_reduce(squares[1:], group=parallel_state.get_expert_tensor_and_model_parallel_group())
    norm = squares.sum().sqrt().item()
    if largest > 0 and norm > largest:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(largest / (norm + 1e-6))
    return norm
