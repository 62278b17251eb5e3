"""Benchmarks a training step with each CPU kernel of the project against torch's implementation of the same function.

    OMP_NUM_THREADS=1 python -m benchmarks.kernels
    OMP_NUM_THREADS=1 python -m benchmarks.kernels model=mone_small micro_batch_size=2 rounds=6 repeats=1 apart=true
    python -m benchmarks.kernels kernels=[attention] clock=wall

Each kernel has three contenders. "kernel" trains with all kernels of the project. "eager" replaces this one kernel by the
function of Megatron-Core or torch that computes the same. "compiled" replaces it by the same function under `torch.compile`.
All train the same model on random tokens in fp32: forward, backward, clipping and AdamW.

A line gives the time of a step, and the time with the kernel over the time without it: the median over the turns, the
smallest and the largest, and the ratio of the fastest turns, which other processes disturb least. Below 0.97 the kernel
saves more than 3 % of a step.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, Run, ratio, time_interleaved
from benchmarks.step import compose, megatron_step
from mone_common.console import ReportedError, command, to_dataclass

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    model: str = "mone_tiny"
    """A model of configs/model."""
    vocab_size: int = 4096
    """Vocabulary size."""
    micro_batch_size: int = 8
    """Sequences per step."""
    kernels: list[str] = field(default_factory=lambda: list(REPLACEMENTS))
    """The kernels to measure."""
    alternatives: list[str] = field(default_factory=lambda: ["eager", "compiled"])
    """Replacements of the kernel: eager, compiled."""
    apart: bool = False
    """Measure the alternatives one after the other, so that only two models are in memory."""
    clock: str = "cpu"
    """cpu: CPU time of the process, least affected by other processes. wall: elapsed time."""
    rounds: int = 10
    """Turns of each contender."""
    repeats: int = 2
    """Steps per turn."""


def _attention(wrap: Wrap) -> None:
    from mone_model.kernels.cpu import attention

    attention.usable = lambda *tensors: False
    F.scaled_dot_product_attention = wrap(F.scaled_dot_product_attention)


# By kernel: a function that replaces the kernel in this process by wrap(torch's function).
REPLACEMENTS: dict[str, Callable[[Wrap], None]] = {
    "attention": _attention,
}

ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_kernels", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)


def build(options: BenchmarkConfig, kernel: str, alternative: str | None) -> Run:
    """A training step; alternative: None for the kernel itself, or "eager" or "compiled"."""
    if alternative == "eager":
        REPLACEMENTS[kernel](lambda function: function)
    elif alternative == "compiled":
        REPLACEMENTS[kernel](torch.compile)
    step = megatron_step(
        compose(
            f"model={options.model}",
            f"model.vocab_size={options.vocab_size}",
            f"training.micro_batch_size={options.micro_batch_size}",
        )
    )
    if alternative == "compiled":
        for _ in range(3):
            step()
        if torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0:
            raise ReportedError(f"{kernel}: torch.compile compiled nothing")
    return step


@command("benchmark_kernels", path=None)
def main(hydra_config: DictConfig) -> None:
    """Measure the kernels one after the other."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    turns = f"{options.rounds} rounds of {options.repeats} steps"
    print(f"{options.model}, {torch.get_num_threads()} threads, {turns}, {options.clock} time", flush=True)
    for kernel in options.kernels:
        sittings = [[name] for name in options.alternatives] if options.apart else [options.alternatives]
        for alternatives in sittings:
            names: dict[str, str | None] = {"kernel": None, **{name: name for name in alternatives}}
            seconds = time_interleaved(
                {name: functools.partial(build, options, kernel, alternative) for name, alternative in names.items()},
                options.rounds,
                options.repeats,
                clock=CLOCKS[options.clock],
            )
            for name in alternatives:
                ours, theirs = seconds["kernel"], seconds[name]
                print(
                    f"  {kernel:14} kernel {1000 * statistics.median(ours):6.0f} ms   "
                    f"{name:9} {1000 * statistics.median(theirs):6.0f} ms   "
                    f"kernel / {name}: {ratio(ours, theirs)}, fastest turns {min(ours) / min(theirs):.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
