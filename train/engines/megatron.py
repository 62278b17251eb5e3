"""The Megatron-Core engine: its DDP, (distributed) optimizer, pipeline schedules and learning-rate schedule.

engine = MegatronEngine(config, runtime)
result = engine.train_step(batches, micro_batches=8, accept=lambda loss, grad_norm: True)
loss = engine.evaluate(batches, micro_batches=4)
engine.load_state(dist_checkpointing.load(engine.sharded_state(loading=True), folder))
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from mone_model.megatron.gpt import build_gpt, moe_layers, update_neuron_biases
from mone_model.weight_sources import WeightSource
from train.config import RunConfig
from train.engines.base import SHARDING, Accept, StepResult, make_scheduler, sums_of_losses
from train.engines.megatron_state import common_form, fill, steps_taken
from train.runtime import Runtime
from train.sources import Batch


class MegatronEngine:
    """The model of this rank, its optimizer and its schedule.

    `modules` are the unwrapped model chunks of this rank, one for each virtual pipeline stage.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, weights: WeightSource | None = None) -> None:
        self.device, self.mixed_precision = runtime.device, config.compute.precision != "fp32"
        self.clip_grad = config.optimizer.clip_grad
        self.sequence = (config.model.seq_length, config.training.micro_batch_size)
        stages = [None] if config.parallel.virtual_pipeline is None else range(config.parallel.virtual_pipeline)
        self.modules = [
            build_gpt(config.model, config.parallel, config.compute, seed=config.run.seed, weights=weights, vp_stage=stage)
            for stage in stages
        ]
        self.model = [
            DistributedDataParallel(
                config=module.config,
                ddp_config=_ddp_config(config),
                module=Float16Module(module.config, module) if module.config.bf16 else module,
                # Gradients of later chunks of an interleaved pipeline are reduced while earlier chunks compute.
                disable_bucketing=index > 0,
            )
            for index, module in enumerate(self.modules)
        ]
        self.optimizer = get_megatron_optimizer(_optimizer_config(config), self.model)
        for optimizer in self.optimizers():
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                # One pass over memory instead of a dozen, as with Megatron-Core's optimizer on GPUs.
                for group in optimizer.optimizer.param_groups:
                    group["fused"] = True
        self.scheduler = make_scheduler(config.optimizer, config.training.steps, self.optimizer)
        megatron = get_model_config(self.model[0])
        megatron.grad_scale_func = self.optimizer.scale_loss
        megatron.finalize_model_grads_func = finalize_model_grads
        if config.parallel.overlap_communication:
            megatron.no_sync_func = [chunk.no_sync for chunk in self.model]
            megatron.grad_sync_func = [chunk.start_grad_sync for chunk in self.model]
            if config.parallel.overlaps_parameter_gather:
                megatron.param_sync_func = [chunk.start_param_sync for chunk in self.model]
            if len(self.model) == 1:
                for name in ("no_sync_func", "grad_sync_func", "param_sync_func"):
                    functions = getattr(megatron, name)
                    setattr(megatron, name, functions[0] if functions else None)

    def train_step(self, batches: Iterator[Batch], *, micro_batches: int, accept: Accept) -> StepResult:
        """One optimizer step over the next micro_batches; a collective on every rank."""
        for chunk in self.model:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        biases = [(bias, bias.clone()) for bias in self._expert_biases()]
        loss = self._run(batches, micro_batches, forward_only=False)
        self.scheduler.step(increment=1)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        applied = accept(loss, grad_norm)
        if applied:
            self._step(grad_norm)
        else:
            # A micro-batch also changes the expert biases.
            for bias, before in biases:
                bias.copy_(before)
        update_neuron_biases(self.modules, applied=applied)
        return StepResult(loss, grad_norm, learning_rate, applied)

    def _expert_biases(self) -> list[torch.Tensor]:
        routers = [router for module in self.modules for *_, router in moe_layers(module)]
        return [router.expert_bias for router in routers if router.expert_bias is not None]

    def _step(self, grad_norm: float) -> None:
        """Clip the prepared gradients and step, as Megatron-Core's optimizers do."""
        excess = (grad_norm + 1e-6) / self.clip_grad if self.clip_grad > 0 else 1.0
        for optimizer in self.optimizers():
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                # Fused AdamW divides the gradients by `grad_scale`, as for GradScaler; that saves a pass over memory.
                optimizer.optimizer.grad_scale = torch.tensor(excess) if excess > 1 else None  # type: ignore[attr-defined]
            elif excess > 1 and (weights := optimizer.get_parameters()):
                clip_grad_by_total_norm_fp32(weights, max_norm=self.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], *, micro_batches: int) -> float:
        """Mean cross-entropy of the next micro_batches in nats per token; a collective on every rank."""
        for chunk in self.model:
            chunk.eval()
        return self._run(batches, micro_batches, forward_only=True)

    def _run(self, batches: Iterator[Batch], micro_batches: int, *, forward_only: bool) -> float:
        seq_length, micro_batch_size = self.sequence
        # All model chunks of an interleaved pipeline read the same micro-batches.
        read = [next(batches) for _ in range(micro_batches)]
        iterators: Any = [iter(read) for _ in self.model]
        parts = get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=micro_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        # Only the last pipeline stage has losses. Its tensor-parallel ranks have equal losses.
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for part in parts:
                total += part["loss_and_tokens"]
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def _forward(self, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in next(batches).items()}
        batch = _context_slice(batch)
        losses_BS = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return losses_BS, functools.partial(_loss, batch["loss_mask"])

    def sharded_state(self, *, loading: bool = False) -> dict[str, Any]:
        """Weights, optimizer and schedule as a Megatron-Core sharded state, to save or (loading) to fill."""
        self._gather_parameters()
        state: dict[str, Any] = {
            f"model{index}": module.sharded_state_dict(metadata=SHARDING) for index, module in enumerate(self.modules)
        }
        state["optimizer"] = common_form(self._optimizer_state(loading), mixed_precision=self.mixed_precision)
        state["optimizer_step"] = steps_taken(self.optimizers())
        state["scheduler"] = self.scheduler.state_dict()
        return state

    def _optimizer_state(self, loading: bool) -> dict[str, Any]:
        if loading:
            # torch's AdamW has no state before its first step; create the state to load into.
            for optimizer in self.optimizers():
                if isinstance(optimizer, DistributedOptimizer) and not optimizer.optimizer.state:
                    optimizer._init_optimizer_states_with_dummy_values()
        weights = {str(index): module.sharded_state_dict(metadata=SHARDING) for index, module in enumerate(self.modules)}
        state: dict[str, Any] = self.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=SHARDING)
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the state that `dist_checkpointing.load` returned for `sharded_state(loading=True)`."""
        for index, module in enumerate(self.modules):
            module.load_state_dict(state[f"model{index}"])
        nested = self._optimizer_state(loading=True)
        fill(nested, state["optimizer"], state["optimizer_step"], self.optimizers())
        self.optimizer.load_state_dict(nested)
        for optimizer in self.optimizers():
            for of_parameter in optimizer.optimizer.state.values():
                # Megatron-Core loads one step counter that all parameters share. Each parameter would then advance it.
                if torch.is_tensor(of_parameter.get("step")):
                    of_parameter["step"] = of_parameter["step"].clone()
        self.scheduler.load_state_dict(state["scheduler"])
        self._gather_parameters()

    def _gather_parameters(self) -> None:
        """Gather the parts of every weight. With overlap, a step leaves this to the next forward pass."""
        for chunk in self.model:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    def optimizers(self) -> list[Any]:
        """The optimizers of the dense and of the expert weights."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))


def _loss(mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total, tokens = sums_of_losses(mask_BS, losses_BS)
    # The schedule divides the loss in place.
    return total, tokens.int(), {"loss_and_tokens": torch.stack([total.detach(), tokens]).double()}


def _context_slice(batch: Batch) -> Batch:
    """This context-parallel rank's part of each sequence: two of 2 x size chunks, which balances causal attention."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    from megatron.core.utils import get_batch_on_this_cp_rank

    return get_batch_on_this_cp_rank(batch)


def _ddp_config(config: RunConfig) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_grad_reduce=config.parallel.overlap_communication,
        overlap_param_gather=config.parallel.overlaps_parameter_gather,
    )


def _optimizer_config(config: RunConfig) -> OptimizerConfig:
    section = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=config.compute.precision == "bf16",
        params_dtype=config.compute.dtype,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlaps_parameter_gather,
    )
