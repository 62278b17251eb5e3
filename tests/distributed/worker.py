"""Runs many layouts in one set of processes and writes what each computed; started by test_layouts.py under torchrun.

torchrun --nproc-per-node 2 -m tests.distributed.worker cases.json results.pt
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mone_model.accounting import estimate_memory
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.gpt import moe_layers
from mone_model.loss_record import reduce_losses
from mone_model.neuron_selection import select_neurons
from mone_model.neuron_stats import reduce_counters
from tests.tiny import TINY_MODEL
from train.config import OptimizerSection, RunConfig, TrainingConfig
from train.data import Batch
from train.engines.megatron import MegatronEngine
from train.loop import auxiliary_loss_names
from train.runtime import Runtime, build_groups, distributed, set_seeds


def sequence(index: int, length: int) -> Batch:
    """Sample `index` of an endless dataset, the same for every layout."""
    tokens = torch.randint(0, 64, (length + 1,), generator=torch.Generator().manual_seed(index))
    return {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "loss_mask": torch.ones(length),
        "position_ids": torch.arange(length),
    }


def batches(config: RunConfig, repeat: bool) -> Iterator[Batch]:
    """This rank's micro-batches; with `repeat`, all global micro-batches of a step are the same."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    micro = config.training.micro_batch_size
    first = 0
    while True:
        rows = [sequence(first + rank * micro + row, config.model.seq_length) for row in range(micro)]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        first += 0 if repeat else micro * size


def run_case(case: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    """Train a few steps on one layout; everything returned is the same on all ranks."""
    config = RunConfig(
        model=ModelConfig(**TINY_MODEL | case.get("model", {})),
        parallel=ParallelConfig(**case.get("parallel", {})),
        compute=ComputeConfig(**case.get("compute", {})),
        training=TrainingConfig(**{"steps": 100, "micro_batch_size": 4, "global_batch_size": 4} | case.get("training", {})),
        optimizer=OptimizerSection(**{"warmup_steps": 2, "clip_grad": 0.5} | case.get("optimizer", {})),
    )
    build_groups(config.parallel)
    set_seeds(config.run.seed)
    engine = MegatronEngine(config, runtime)
    layers = [layer for module in engine.modules for layer in moe_layers(module)]
    for _, experts, _ in layers:
        experts.counting_neurons = True
    read = batches(config, case.get("repeat", False))
    micro_batches = config.micro_batches(runtime.world_size)
    losses, norms = [], []
    for _ in range(case.get("run_steps", 1)):
        for _, experts, router in layers:
            experts.record.reset()
            router.record.reset()
        result = engine.train_step(read, micro_batches=micro_batches)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    auxiliary = reduce_losses(
        {layer: [experts.record, router.record] for layer, experts, router in layers},
        names=auxiliary_loss_names(config),
        num_layers=config.model.num_layers,
    )
    usage = reduce_counters(
        {layer: experts.counters for layer, experts, _ in layers if experts.counters is not None},
        num_layers=config.model.num_layers,
        num_experts=config.model.num_experts,
        num_neurons=config.model.moe_ffn_hidden_size,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
    )
    results: dict[str, Any] = {"losses": losses, "norms": norms, "auxiliary": auxiliary, "usage": vars(usage)}
    results["memory"] = measured_and_estimated_memory(engine, config, runtime)
    if case.get("weights"):
        engine.sharded_state()  # what is about to be saved must be whole
        results["weights"] = {name: weight.detach().clone() for name, weight in engine.modules[0].named_parameters()}
    if case.get("gradients"):
        results["gradients"] = whole_gradients(engine)
    parallel_state.destroy_model_parallel()
    return results


def measured_and_estimated_memory(
    engine: MegatronEngine, config: RunConfig, runtime: Runtime
) -> tuple[list[int], list[int]]:
    """Bytes of weights, gradients and optimizer state over all ranks: of the tensors there are, and as estimated."""
    weights = list(engine.modules[0].parameters())
    states = [state for optimizer in engine.optimizers() for state in optimizer.optimizer.state.values()]
    moments = [tensor for state in states for tensor in state.values() if tensor.dim() > 0]
    gradients = [weight.main_grad for weight in weights]
    parts = [sum(tensor.nbytes for tensor in tensors) for tensors in (weights, gradients, moments)]
    measured = torch.tensor(parts)
    dist.all_reduce(measured)
    memory = estimate_memory(
        config.model,
        config.parallel,
        config.compute,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_size=config.data_parallel_size(runtime.world_size),
    )
    estimated = [memory.weights, memory.gradients, memory.optimizer]
    return measured.tolist(), [runtime.world_size * part for part in estimated]


def whole_gradients(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """The gradients of all weights, experts put together from their expert- and expert-tensor-parallel ranks."""
    whole = {}
    for name, weight in engine.modules[0].named_parameters():
        gradient = weight.main_grad.clone()
        if not getattr(weight, "allreduce", True):
            axis = 2  # of neurons, in both expert weights
            gradient = gather(gradient, parallel_state.get_expert_tensor_parallel_group(), axis)
            gradient = gather(gradient, parallel_state.get_expert_model_parallel_group(), 0)
        whole[name] = gradient
    return whole


def gather(tensor: torch.Tensor, group: Any, axis: int) -> torch.Tensor:
    """Concatenate the tensors of all ranks of a group."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=axis)


def select_tied_neurons() -> torch.Tensor:
    """The masks [R, N, h] of all ranks, of `tied_gate`, whose neurons are shared out among them."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    part = tied_gate().chunk(ranks, dim=1)[rank].contiguous()
    mask = select_neurons(part, TIED_K, dist.group.WORLD).mask_NH
    masks = [torch.empty_like(mask) for _ in range(ranks)]
    dist.all_gather(masks, mask)
    return torch.stack(masks)


def tied_gate() -> torch.Tensor:
    """[500, 16] with four different magnitudes, so that ties on several ranks are the rule."""
    return torch.randint(-3, 4, (500, 16), generator=torch.Generator().manual_seed(0)).float()


TIED_K = 5


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    with distributed(ParallelConfig(), seed=1, timeout_minutes=2) as runtime:
        parallel_state.destroy_model_parallel()
        results: dict[str, Any] = {name: run_case(case, runtime) for name, case in cases.items()}
        results[f"tied/{runtime.world_size}"] = select_tied_neurons()
        if runtime.is_main:
            torch.save(results, sys.argv[2])
        build_groups(ParallelConfig())


if __name__ == "__main__":
    main()
