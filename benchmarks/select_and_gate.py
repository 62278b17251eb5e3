"""Benchmarks `select_and_gate`, forward and backward, against silu(gate) * up without selection.

    python -m benchmarks.select_and_gate
    python -m benchmarks.select_and_gate dtype=bf16

The baseline is silu(gate) * up in torch. topk: the same selection with torch operations.
"""

import functools
import statistics
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, Run, ratio, time_interleaved
from mone_common.console import command, to_dataclass
from mone_model import megatron

megatron.prepare()  # also in the processes of the contenders, which import this module
# ruff: noqa: E402

from mone_model.neuron_selection import select_and_gate, select_neurons
from train.runtime import keep_freed_memory


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    elements: int = 4_194_304
    """Number of gates: rows times neurons."""
    neurons: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    """Neurons H per row."""
    ratios: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5])
    """Shares of neurons kept."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    rounds: int = 31
    """Turns of each contender."""
    repeats: int = 12
    """Passes per turn."""


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_select_and_gate", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)


def build(options: BenchmarkConfig, how: str, neurons: int, share: float) -> Run:
    """Forward and backward; how: eager, ours or topk."""
    keep_freed_memory()
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    rows, k = options.elements // neurons, round(share * neurons)
    gate, up = (torch.randn(rows, neurons).to(dtype).requires_grad_() for _ in range(2))
    probs = torch.rand(rows).requires_grad_()
    target = torch.randn(rows, neurons).to(dtype)

    def run() -> None:
        if how == "ours":
            torch.autograd.grad(select_and_gate(gate, up, probs, k).hidden_NH, [gate, up, probs], target)
        elif how == "topk":
            active = F.silu(gate)
            hidden = active * up * select_neurons(active, k).mask_NH * probs[:, None].to(dtype)
            torch.autograd.grad(hidden, [gate, up, probs], target)
        else:
            torch.autograd.grad(F.silu(gate) * up, [gate, up], target)

    return run


@command("benchmark_select_and_gate", path=None)
def main(hydra_config: DictConfig) -> None:
    """Print the time relative to silu(gate) * up."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    print(f"{options.dtype}, {options.elements} gates, {torch.get_num_threads()} threads")
    print("     H    K/H  silu * up ms   ours / it            topk / it")
    for neurons in options.neurons:
        cases = {("eager", 1.0)} | {(how, share) for share in options.ratios for how in ("ours", "topk")}
        contenders = {f"{how} {share}": functools.partial(build, options, how, neurons, share) for how, share in cases}
        seconds = time_interleaved(contenders, options.rounds, options.repeats)
        eager = seconds["eager 1.0"]
        for share in options.ratios:
            ours, topk = (ratio(seconds[f"{how} {share}"], eager) for how in ("ours", "topk"))
            print(f"  {neurons:4} {share:6.3g} {1000 * statistics.median(eager):13.1f}   {ours:20} {topk}")


if __name__ == "__main__":
    main()
