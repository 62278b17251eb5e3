"""Benchmarks a training step against a cost model for growing tokens, experts, neurons, layers and expert parallelism.

    python -m benchmarks.scaling figure=scaling.png

The cost of a step is the time of its floating-point operations, memory traffic and communication at the speed of this
machine. The speeds are measured in the same turns with a plain matrix product, an addition of two long vectors, and an
all-to-all between two processes. If the step scales as expected, its time is a constant multiple of the cost.

Forward, backward, clipping and AdamW on random tokens, fp32. Each series changes one option of the base; a list with one
value leaves its series out. Expert parallelism distributes the same experts and tokens over processes on the same cores.
"""

import functools
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, Run, ratio, time_interleaved
from benchmarks.step import compose, megatron_step
from mone_common.console import UserError, command, to_dataclass
from mone_model import megatron
from mone_model.accounting import count_communication, count_parameters, count_training_flops, estimate_memory
from train.config import RunConfig


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    model: str = "mone_tiny"
    """A model of configs/model: the base."""
    activation_ratio: float = 0.25
    """Share of neurons kept."""
    vocab_size: int = 4096
    """Vocabulary size."""
    experts: str = "sparse"
    """compute.experts; the cost counts the operations of this backend."""
    sequences: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    """Sequences per step; the base has the middle value."""
    num_experts: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])
    """Experts per layer."""
    neurons: list[int] = field(default_factory=lambda: [128, 256, 512, 1024, 2048])
    """Neurons H per expert."""
    layers: list[int] = field(default_factory=lambda: [2, 4, 8, 16])
    """Number of layers."""
    expert_parallel: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Expert-parallel processes."""
    rounds: int = 4
    """Turns of each contender."""
    repeats: int = 2
    """Steps per turn."""
    figure: str | None = None
    """Path of a PNG file for the figure."""


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_scaling", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)


def series_of(options: BenchmarkConfig) -> dict[str, dict[int, RunConfig]]:
    """Configurations by series and size."""
    if not options.sequences:
        raise UserError("sequences=[]: give at least the value of the base, e.g. sequences=[16]")
    sequences = options.sequences[len(options.sequences) // 2]
    base = {
        "model": options.model,
        "model.vocab_size": options.vocab_size,
        "model.activation_ratio": options.activation_ratio,
        "compute.experts": options.experts,
        "training.micro_batch_size": sequences,
    }

    def run(**changed: int) -> RunConfig:
        return compose(*(f"{name}={value}" for name, value in (base | changed).items()))

    def spread(processes: int) -> dict[str, int]:
        return {"parallel.expert": processes, "training.micro_batch_size": sequences // processes}

    length = run().model.seq_length
    series = {
        "tokens": {n * length: run(**{"training.micro_batch_size": n}) for n in options.sequences},
        "experts": {n: run(**{"model.num_experts": n}) for n in options.num_experts},
        "neurons of an expert": {n: run(**{"model.moe_ffn_hidden_size": n}) for n in options.neurons},
        "layers": {n: run(**{"model.num_layers": n}) for n in options.layers},
        "expert-parallel processes": {n: run(**spread(n)) for n in options.expert_parallel},
    }
    series = {name: runs for name, runs in series.items() if len(runs) > 1}
    if not series:
        raise UserError(f"sequences={options.sequences}: no series; give this or another option more than one value")
    return series


@dataclass(frozen=True)
class Cost:
    """Operations and bytes of a step, summed over its processes."""

    flops: float
    moved: float
    """Bytes read from or written to memory."""
    sent: float
    """Bytes sent to other processes."""

    def seconds(self, product: float, add: float, send: float) -> float:
        """Time on a machine on which the three reference operations take so many seconds."""
        return self.flops / PRODUCT_FLOPS * product + self.moved / ADDED_BYTES * add + self.sent / EXCHANGED_BYTES * send


def cost_of(config: RunConfig) -> Cost:
    """The cost of a step: operations of `count_training_flops`, and bytes of weights and saved activations.

    Both passes read the weights. Accumulated gradients are cleared; new gradients are written and added to them (four more
    passes), except those of sparse experts, which are written directly. The optimizer reads the gradients for the norm, then
    reads and writes four numbers per weight. Activations are written and read once.
    """
    processes, size = config.parallel.expert, config.training.micro_batch_size
    tokens = processes * size * config.model.seq_length
    described = config.model, config.parallel, config.compute
    memory = estimate_memory(*described, micro_batch_size=size, data_parallel_size=processes)
    sent = count_communication(*described, micro_batch_size=size, data_parallel_size=processes, micro_batches=1)
    skips, flops = config.compute.experts == "sparse", count_training_flops(config.model)
    saved = 4 * 4 * count_parameters(config.model).experts / processes if skips else 0
    # Half of the optimizer's bytes are one number per weight.
    moved = 7 * memory.weights - saved + 9 * memory.optimizer / 2 + 2 * (memory.activations + memory.working)
    return Cost(
        flops=(flops.sparse if skips else flops.dense) * tokens,
        moved=processes * moved,
        sent=processes * sum(part.bytes for part in sent.values()),
    )


PRODUCT_SIZE = 2048
PRODUCT_FLOPS = 2 * PRODUCT_SIZE**3
ADDED, EXCHANGED = 2**25, 2**22
ADDED_BYTES = 3 * 4 * ADDED
# Each of the two processes sends half of its data.
EXCHANGED_BYTES = 2 * 4 * EXCHANGED // 2


def build_product() -> Run:
    """A plain fp32 matrix product, as a training step runs it."""
    megatron.prepare()
    from train.runtime import keep_freed_memory  # imports Megatron-Core

    keep_freed_memory()
    a, b = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE), torch.randn(PRODUCT_SIZE, PRODUCT_SIZE)
    return lambda: torch.mm(a, b)


def build_add() -> Run:
    """Add two vectors larger than the caches."""
    a, b, out = torch.ones(ADDED), torch.ones(ADDED), torch.ones(ADDED)
    return lambda: torch.add(a, b, out=out)


def build_exchange() -> Run:
    """An all-to-all of tensors larger than the caches."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    there, here = torch.ones(EXCHANGED), torch.ones(EXCHANGED)
    return lambda: dist.all_to_all_single(here, there)


@dataclass(frozen=True)
class Point:
    """Measurement of one size."""

    size: int
    cost: Cost
    expected: list[float]
    """Seconds according to the cost model, by round."""
    seconds: list[float]

    @property
    def multiples(self) -> list[float]:
        """Measured time divided by the cost, by round."""
        return [measured / expected for measured, expected in zip(self.seconds, self.expected, strict=True)]


def measure(runs: dict[int, RunConfig], options: BenchmarkConfig) -> list[Point]:
    """Time the sizes of a series in turns with the reference operations."""
    steps = {str(size): functools.partial(megatron_step, config) for size, config in runs.items()}
    yardsticks = {
        "product": functools.partial(build_product),
        "add": functools.partial(build_add),
        "exchange": functools.partial(build_exchange),
    }
    processes = {str(size): config.parallel.expert for size, config in runs.items()} | {"exchange": 2}
    seconds = time_interleaved(steps | yardsticks, options.rounds, options.repeats, processes)
    speeds = list(zip(*(seconds[name] for name in yardsticks), strict=True))
    costs = {size: cost_of(config) for size, config in runs.items()}
    return [Point(size, cost, [cost.seconds(*of) for of in speeds], seconds[str(size)]) for size, cost in costs.items()]


@command("benchmark_scaling", path=None)
def main(hydra_config: DictConfig) -> None:
    """Print each step time with its cost, and draw the figure."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    print(f"{options.model}, activation_ratio={options.activation_ratio}, experts={options.experts}, ", end="")
    print(f"{torch.get_num_threads()} cores, {options.rounds} rounds of {options.repeats} steps", flush=True)
    found = {}
    for name, runs in series_of(options).items():
        found[name] = measure(runs, options)
        report(name, found[name])
    multiples = [statistics.median(point.multiples) for points in found.values() for point in points]
    print(f"all: {statistics.median(multiples):.2f} [{min(multiples):.2f}, {max(multiples):.2f}] times the cost")
    if options.figure is not None:
        draw(Path(options.figure), found, statistics.median(multiples))
        print(f"drawn: {options.figure}")


def report(name: str, points: list[Point]) -> None:
    """Print a series and its linear fit."""
    x = [statistics.median(point.expected) for point in points]
    y = [statistics.median(point.seconds) for point in points]
    slope, begin = np.polyfit(x, y, 1)
    print(f"{name}: {1000 * begin:.0f} ms + {slope:.2f} x cost, R^2 {np.corrcoef(x, y)[0, 1] ** 2:.4f}")
    for point, expected, measured in zip(points, x, y, strict=True):
        cost = point.cost
        print(f"  {point.size:6}  {cost.flops / 1e9:6.1f} GFLOP, {cost.moved / 1e9:5.2f} GB moved, ", end="")
        print(f"{cost.sent / 1e6:5.1f} MB sent: {1000 * expected:6.0f} ms   measured {1000 * measured:6.0f}   ", end="")
        print(f"measured / cost: {ratio(point.seconds, point.expected)}", flush=True)


def draw(path: Path, found: dict[str, list[Point]], multiple: float) -> None:
    """Draw one panel per series: measured times with their spread, and one multiple of the cost for all."""
    from mone_common.figures import plt, save

    figure, panels = plt.subplots(
        1, len(found), figsize=(2.6 * len(found), 3), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (name, points) in zip(panels[0], found.items(), strict=True):
        x = [point.size for point in points]
        cost = np.array([statistics.median(point.expected) for point in points])
        # Relative to the speed of the machine in the median round.
        low, middle, high = (cost * [of(point.multiples) for point in points] for of in (min, statistics.median, max))
        axes.plot(x, multiple * cost, color="grey", label=f"{multiple:.2f} x cost")
        axes.errorbar(x, middle, [middle - low, high - middle], color="black", fmt="o", markersize=4, label="measured")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(x, [str(size) for size in x])
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("seconds of a step")
    panels[0, 0].legend(fontsize=8, loc="upper left")
    save(figure, path)


if __name__ == "__main__":
    main()
