"""Runs many layouts in one set of processes and writes what each computed; started by test_layouts.py under torchrun.

torchrun --nproc-per-node 2 -m tests.distributed.worker cases.json results.pt
"""

import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from mone_model.accounting import estimate_memory
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.gpt import moe_layers
from mone_model.loss_record import reduce_losses
from mone_model.neuron_selection import select_neurons
from mone_model.neuron_stats import reduce_counters
from tests.tiny import TINY_MODEL, always
from train.config import DeepSpeedSection, OptimizerSection, RunConfig, TrainingConfig
from train.data import Batch
from train.engines import build_engine
from train.engines.base import Engine
from train.engines.megatron import MegatronEngine
from train.recorder import auxiliary_loss_names
from train.runtime import Runtime, distributed, rendezvous


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


def run_case(case: dict[str, Any], store: dist.Store) -> Any:
    """Train a few steps on one layout; everything returned is the same on all ranks."""
    if case.get("tied"):
        with distributed(ParallelConfig(), seed=1, timeout_minutes=2, store=store):
            return select_tied_neurons()
    config = RunConfig(
        engine=case.get("engine", "megatron"),
        deepspeed=DeepSpeedSection(**case.get("deepspeed", {})),
        model=ModelConfig(**TINY_MODEL | case.get("model", {})),
        parallel=ParallelConfig(**case.get("parallel", {})),
        compute=ComputeConfig(**case.get("compute", {})),
        training=TrainingConfig(**{"steps": 100, "micro_batch_size": 4, "global_batch_size": 4} | case.get("training", {})),
        optimizer=OptimizerSection(**{"warmup_steps": 2, "clip_grad": 0.5} | case.get("optimizer", {})),
    )
    with distributed(config.parallel, seed=config.run.seed, timeout_minutes=2, store=store) as runtime:
        return train(case, config, runtime)


def train(case: dict[str, Any], config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    """What one case asks for."""
    engine = build_engine(config, runtime)
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
        result = engine.train_step(read, micro_batches=micro_batches, accept=always)
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
    if isinstance(engine, MegatronEngine):
        results["memory"] = measured_and_estimated_memory(engine, config, runtime)
    if case.get("weights"):
        engine.sharded_state()  # what is about to be saved must be whole
        results["weights"] = whole(engine, lambda weight: weight)
    if case.get("gradients"):
        results["gradients"] = whole(engine, lambda weight: weight.main_grad)  # type: ignore[attr-defined]
    return results


def measured_and_estimated_memory(
    engine: MegatronEngine, config: RunConfig, runtime: Runtime
) -> tuple[list[int], list[int]]:
    """Bytes of weights, gradients and optimizer state over all ranks: of the tensors there are, and as estimated."""
    weights = [weight for module in engine.modules for weight in module.parameters()]
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


def whole(engine: Engine, part_of: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `part_of` gives for every weight, put together from all ranks, by the weight's name in a checkpoint."""
    mine: list[tuple[str, Any, Any, torch.Tensor]] = []
    for module in engine.modules:
        for entry in module.sharded_state_dict().values():
            if isinstance(getattr(entry, "data", None), torch.nn.Parameter):
                entry = dataclasses.replace(entry, data=part_of(entry.data).detach())
                parts: Any = {"part": entry}
                apply_factories(parts)  # gate and up of the shared expert are split one by one
                mine += [
                    (part.key, part.global_shape, part.global_slice(), part.data)
                    for part in nested_values(parts)
                    if isinstance(part, ShardedTensor)
                ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    assembled: dict[str, torch.Tensor] = {}
    for key, shape, place, data in (part for parts in gathered for part in parts):
        assembled.setdefault(key, torch.full(shape, torch.nan))[place] = data.float()
    return assembled


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
    """Run each case in a forked process: Megatron-Core's groups, of three threads each, do not end before their process."""
    cases = json.loads(Path(sys.argv[1]).read_text())
    for index, (name, case) in enumerate(cases.items()):
        child = multiprocessing.get_context("fork").Process(target=run_and_write, args=(index, name, case))
        child.start()
        child.join()
        if child.exitcode != 0:
            sys.exit(f"{name}: failed with code {child.exitcode}")
    if os.environ["RANK"] == "0":
        torch.save({name: torch.load(part(index)) for index, name in enumerate(cases)}, sys.argv[2])


def run_and_write(index: int, name: str, case: dict[str, Any]) -> None:
    """One case, from its groups to its results on disk."""
    result = run_case(case, dist.PrefixStore(name, rendezvous()))
    if os.environ["RANK"] == "0":
        torch.save(result, part(index))


def part(index: int) -> Path:
    """The file with the results of one case."""
    return Path(f"{sys.argv[2]}.{index}")


if __name__ == "__main__":
    main()
