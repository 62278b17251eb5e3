"""Run many cases on real processes and write the results.

results = run_cases({1: {"one": {}}, 2: {"dp2": {}, "ep2": {"parallel": {"expert": 2}}}}, folder)      # from a test
python -m tests.distributed.worker cases.json results.pt                                               # what that starts
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mone_model import megatron

megatron.prepare()
# ruff: noqa: E402
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.pipeline_parallel import get_forward_backward_func

from benchmarks.interleaved_timing import torchrun_environments
from mone_model.accounting import estimate_memory
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.loss_record import reduce_losses
from mone_model.megatron.gpt import moe_layers
from mone_model.neuron_selection import select_neurons
from mone_model.neuron_stats import reduce_counters
from tests.tiny import TINY_MODEL, always, facts_of
from train import checkpoint
from train.checkpoint import Saver
from train.checkpoint_integrity import list_checkpoints
from train.checkpoint_loading import load_checkpoint
from train.config import RunConfig
from train.config_init import InitConfig
from train.config_sections import CheckpointConfig, DeepSpeedConfig, GuardConfig, OptimizerConfig, TrainingConfig
from train.engines import build_engine
from train.engines.base import Engine
from train.engines.megatron import MegatronEngine
from train.guards import StepGuard
from train.initial_source import open_source
from train.recorder import auxiliary_loss_names
from train.runtime import Runtime, distributed, set_seeds
from train.sources import Batch


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


def run_cases(cases: dict[int, dict[str, dict[str, Any]]], folder: Path) -> dict[str, Any]:
    """Run cases over gloo and return their results; cases: by number of processes and by unique name."""
    asked, computed = folder / "cases.json", folder / "results.pt"
    asked.write_text(json.dumps(cases))
    run = subprocess.run(
        [sys.executable, "-m", "tests.distributed.worker", str(asked), str(computed)],
        cwd=Path(__file__).parent.parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    results: dict[str, Any] = torch.load(computed)
    return results


def config_of(case: dict[str, Any]) -> RunConfig:
    """The config of a case."""
    return RunConfig(
        engine=case.get("engine", "megatron"),
        deepspeed=DeepSpeedConfig(**case.get("deepspeed", {})),
        init=InitConfig(**case.get("init", {})),
        model=ModelConfig(**TINY_MODEL | case.get("model", {})),
        parallel=ParallelConfig(**case.get("parallel", {})),
        # Not auto: two runs may choose different backends.
        compute=ComputeConfig(**{"experts": "grouped"} | case.get("compute", {})),
        training=TrainingConfig(**{"steps": 100, "micro_batch_size": 4, "global_batch_size": 4} | case.get("training", {})),
        optimizer=OptimizerConfig(**{"warmup_steps": 2, "clip_grad": 0.5} | case.get("optimizer", {})),
    )


def run_case(case: dict[str, Any], runtime: Runtime) -> Any:
    """Train a few steps on one layout; everything returned is the same on all ranks."""
    if case.get("tied"):
        return select_tied_neurons()
    config = config_of(case)
    torch.set_num_threads(1)  # the models are tiny, and threads are slow on shared cores
    set_seeds(config.run.seed)
    return train(case, config, runtime)


def train(case: dict[str, Any], config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    """Run one case."""
    weights, initial = (None, None) if config.init.source is None else open_source(config, runtime.device)
    engine = build_engine(config, runtime, weights)
    if "save_weights" in case:
        save_weights(engine, config, Path(case["save_weights"]))
    if "logits" in case:
        return {
            "weights": whole_weights(engine),
            "logits": logits(engine, config, torch.tensor(case["logits"])),
            "initial": initial,
        }
    layers = [layer for module in engine.modules for layer in moe_layers(module)]
    for _, experts, _ in layers:
        experts.counting_neurons = True
    read = batches(config, case.get("repeat", False))
    micro_batches = config.micro_batches(runtime.world_size)
    results: dict[str, Any] = {}
    skipped = 0
    if "load" in case:
        skipped = load(engine, Path(case["load"]))
        results["loaded"] = whole_state(engine)
        for _ in range(skipped * micro_batches):
            next(read)
    guard = StepGuard(GuardConfig(), runtime.device)
    losses, norms, rates, applied, kept = [], [], [], [], []
    for step in range(skipped, skipped + case.get("run_steps", 1)):
        if step in case.get("omit", []):  # omit the step, but advance the schedule
            for _ in range(micro_batches):
                next(read)
            engine.scheduler.step(increment=1)  # type: ignore[attr-defined]
            continue
        for _, experts, router in layers:
            experts.record.reset()
            router.record.reset()
        disturbed = step in case.get("refuse", []) or step in case.get("poison", [])
        before = whole_state(engine) if disturbed else {}
        with poisoned(engine, case["poison_name"] if step in case.get("poison", []) else None):
            accept = refuse if step in case.get("refuse", []) else functools.partial(guard.accepts, step)
            result = engine.train_step(read, micro_batches=micro_batches, accept=accept)
        if disturbed:
            kept.append(differences(before, whole_state(engine)))
        losses.append(result.loss)
        norms.append(result.grad_norm)
        rates.append(result.learning_rate)
        applied.append(result.applied)
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
    results |= {"losses": losses, "norms": norms, "auxiliary": auxiliary, "usage": vars(usage)}
    results |= {"rates": rates, "applied": applied, "kept": kept, "alike": alike(losses, norms, rates, applied)}
    if isinstance(engine, MegatronEngine):
        results["memory"] = measured_and_estimated_memory(engine, config, runtime)
    if case.get("weights"):
        engine.sharded_state()  # gathers all weights before a save
        results["weights"] = whole(engine, lambda weight: weight)
    if case.get("gradients"):
        results["gradients"] = whole(engine, lambda weight: weight.main_grad)  # type: ignore[attr-defined]
    if "save" in case:
        results["state"] = whole_state(engine)
        save(engine, Path(case["save"]), skipped + case["run_steps"])
    if "save_while_training" in case:
        results |= save_while_training(
            engine,
            Path(case["save_while_training"]),
            lambda: engine.train_step(read, micro_batches=micro_batches, accept=always),
        )
    return results


@torch.no_grad()
def logits(engine: Engine, config: RunConfig, tokens_BS: torch.Tensor) -> torch.Tensor | None:
    """[B, s, V] in evaluation mode, B a multiple of 2; None with ZeRO. A collective; each replica computes all of it."""
    if not isinstance(engine, MegatronEngine):
        return None
    size = len(tokens_BS) // 2

    def forward(batches: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        tokens = next(batches)
        positions = torch.arange(tokens.size(1)).expand_as(tokens)
        output = model(tokens, positions, None, runtime_gather_output=True)
        return output, lambda logits_BSV, non_loss_data: logits_BSV

    for chunk in engine.model:
        chunk.eval()
    iterators = [iter(tokens_BS.split(size)) for _ in engine.model]
    parts = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=engine.model if len(iterators) > 1 else engine.model[0],
        num_microbatches=2,
        seq_length=tokens_BS.size(1),
        micro_batch_size=size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, torch.cat(parts)[..., : config.model.vocab_size] if parts else None)
    return next(each for each in found if each is not None)


def refuse(loss: float, grad_norm: float) -> bool:
    """Refuse every step."""
    return False


@contextlib.contextmanager
def poisoned(engine: Engine, name: str | None) -> Iterator[None]:
    """Context in which the gradient of one weight is NaN on the last rank; None: no change."""

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if hasattr(weight, "main_grad"):  # to which sparse experts have already added their gradient
            weight.main_grad.fill_(torch.nan)
        return gradient * torch.nan

    if name is None or dist.get_rank() < dist.get_world_size() - 1:
        yield
        return
    weight = dict(engine.modules[0].named_parameters())[name]
    hook = weight.register_hook(poison)
    yield
    hook.remove()


def alike(*mine: list[Any]) -> bool:
    """Whether all ranks have equal values."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, repr(mine))  # the repr of NaN is equal to itself
    return len(set(gathered)) == 1


def differences(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not bitwise equal or missing on one side."""
    return [
        name
        for name in sorted(actual.keys() | expected.keys())
        if name not in actual
        or name not in expected
        or actual[name].dtype != expected[name].dtype
        or not torch.equal(actual[name], expected[name])
    ]


def save(engine: Engine, folder: Path, step: int) -> None:
    """Write and publish a checkpoint of an engine."""
    saver = Saver(folder, CheckpointConfig())
    saver.save(step=step, state=engine.sharded_state(), facts=facts_of(step, world_size=dist.get_world_size()))
    saver.finish(wait=True)


def load(engine: Engine, folder: Path) -> int:
    """Load the newest checkpoint of a folder and return its step."""
    found, problems = list_checkpoints(folder)
    assert not problems, problems
    engine.load_state(load_checkpoint(found[-1], engine.sharded_state(loading=True), same_layout=False))
    return found[-1].step


def save_weights(engine: Engine, config: RunConfig, folder: Path) -> None:
    """Save the weights alone, before the first step; a collective."""
    saver = Saver(folder, CheckpointConfig())
    state = {f"model{index}": module.sharded_state_dict() for index, module in enumerate(engine.modules)}
    saver.save(
        step=1, state=state, facts=facts_of(1, world_size=dist.get_world_size(), model=dataclasses.asdict(config.model))
    )
    saver.finish(wait=True)


def save_while_training(engine: Engine, folder: Path, train_step: Callable[[], Any]) -> dict[str, Any]:
    """Start a save, train two steps while the writers are blocked, and then release them."""
    go, write = folder.with_name(f"{folder.name}-go"), checkpoint._write_and_digest

    def write_later(*args: Any, **kwargs: Any) -> None:
        while not go.exists():
            time.sleep(0.01)
        write(*args, **kwargs)

    checkpoint._write_and_digest = write_later
    before = whole_state(engine)
    saver = Saver(folder, CheckpointConfig(async_save=True))
    saver.save(step=1, state=engine.sharded_state(), facts=facts_of(1, world_size=dist.get_world_size()))
    unpublished = []
    for _ in range(2):
        train_step()
        unpublished.append(saver.finish(wait=False) is None and not list(folder.glob("step-*")))
    after = whole_state(engine)
    dist.barrier()
    go.touch()
    saved = saver.finish(wait=True)
    assert saved is not None
    return {"before": before, "after": after, "unpublished": unpublished, "published": saved.path.name}


def measured_and_estimated_memory(
    engine: MegatronEngine, config: RunConfig, runtime: Runtime
) -> tuple[list[int], list[int]]:
    """Bytes of weights, gradients and optimizer state over all ranks: actual and estimated."""
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
    """`part_of` of every weight, assembled from all ranks, by the weight's name in a checkpoint."""
    mine: list[tuple[str, Any, Any, torch.Tensor]] = []
    for module in engine.modules:
        for entry in module.sharded_state_dict().values():
            if isinstance(getattr(entry, "data", None), torch.nn.Parameter):
                entry = dataclasses.replace(entry, data=part_of(entry.data).detach())
                parts: Any = {"part": entry}
                apply_factories(parts)  # splits gate and up of the shared expert separately
                mine += [
                    (part.key, part.global_shape, part.global_slice(), part.data)
                    for part in nested_values(parts)
                    if isinstance(part, ShardedTensor)
                ]
    return {key: tensor.float() for key, tensor in assembled(mine).items()}


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, assembled from all ranks, and the two counters; a collective."""
    state = engine.sharded_state()
    counters = {"steps": state["optimizer_step"], "scheduler steps": state["scheduler"]["num_steps"]}
    return whole_tensors(state) | {name: torch.tensor(count) for name, count in counters.items()}


def whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """Every weight and buffer of a checkpoint, assembled from all ranks, also before the first step; a collective."""
    if isinstance(engine, MegatronEngine):
        return whole_tensors({str(index): module.sharded_state_dict() for index, module in enumerate(engine.modules)})
    return whole_tensors(engine.sharded_state()["model0"])


def whole_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a sharded state, assembled from all ranks."""
    apply_factories(state)
    return assembled(
        [
            (entry.key, entry.global_shape, entry.global_slice(), entry.data.detach())
            for entry in nested_values(state)
            if isinstance(entry, ShardedTensor)
        ]
    )


def assembled(mine: list[tuple[str, Any, Any, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Whole tensors from the parts of all ranks; AssertionError if a part is missing or replicas differ."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    tensors: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for key, shape, place, data in (part for parts in gathered for part in parts):
        tensor = tensors.setdefault(key, torch.zeros(shape, dtype=data.dtype))
        there = filled.setdefault(key, torch.zeros(shape, dtype=torch.bool))
        assert not there[place].any() or torch.equal(tensor[place], data), f"{key}: replicas differ"
        tensor[place], there[place] = data, True
    for key, there in filled.items():
        assert there.all(), f"{key}: a part is missing"
    return tensors


def select_tied_neurons() -> torch.Tensor:
    """The masks [R, N, h] of all ranks for `tied_gate`, whose neurons are partitioned over the ranks."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    part = tied_gate().chunk(ranks, dim=1)[rank].contiguous()
    mask = select_neurons(part, TIED_K, dist.group.WORLD).mask_NH
    masks = [torch.empty_like(mask) for _ in range(ranks)]
    dist.all_gather(masks, mask)
    return torch.stack(masks)


def tied_gate() -> torch.Tensor:
    """[600, 16] with four distinct magnitudes, so that there are many ties across ranks; the last 100 have NaN and inf."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([3.0, math.inf, -math.inf, math.nan])
    broken = values[torch.randint(0, 4, (100, 16), generator=generator)]
    return torch.cat([torch.randint(-3, 4, (500, 16), generator=generator).float(), broken])


TIED_K = 5


def main() -> None:
    """Run the cases of each layout in forked processes, which saves imports and the teardown of process groups."""
    cases = {int(processes): of_them for processes, of_them in json.loads(Path(sys.argv[1]).read_text()).items()}
    parts = {name: Path(f"{sys.argv[2]}.{index}") for index, name in enumerate(itertools.chain(*cases.values()))}
    if any(case.get("engine") == "deepspeed" for of_them in cases.values() for case in of_them.values()):
        import deepspeed  # noqa: F401  takes seconds; import it once before the forks
    for processes, of_them in cases.items():
        for _, alike in itertools.groupby(of_them.items(), lambda item: layout_of(item[1])):
            run_in_processes(processes, {name: (case, parts[name]) for name, case in alike})
    torch.save({name: torch.load(part) for name, part in parts.items()}, sys.argv[2])


def layout_of(case: dict[str, Any]) -> list[Any]:
    """The options that determine the process groups."""
    parallel = config_of(case).parallel
    degrees = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
    return [getattr(parallel, degree) for degree in degrees]


Items = dict[str, tuple[dict[str, Any], Path]]


def run_in_processes(count: int, items: Items) -> None:
    """Run the cases of one layout on `ranks` processes; ends this process if one of them fails."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_and_write, args=(place, items)) for place in torchrun_environments(count)]
    for process in ranks:
        process.start()
    running: dict[Any, Any] = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in multiprocessing.connection.wait(list(running)):
            ended = running.pop(sentinel)
            ended.join()
            if ended.exitcode != 0:
                for process in running.values():
                    process.kill()
                sys.exit(f"{list(items)}: a process ended with code {ended.exitcode}")


def run_and_write(place: dict[str, str], items: Items) -> None:
    """Run the cases of one layout on one rank and write the results."""
    os.environ.update(place)
    (first, _), *_ = items.values()
    with distributed(config_of(first).parallel, seed=1, timeout_minutes=2) as runtime:
        for name, (case, part) in items.items():
            try:
                result = run_case(case, runtime)
            except Exception as error:
                raise RuntimeError(f"case {name}") from error
            if runtime.is_main:
                torch.save(result, part)


if __name__ == "__main__":
    main()
