"""Benchmarks the CPU attention kernel against torch's scaled_dot_product_attention, forward and backward.

python -m benchmarks.attention
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

from mone_model.kernels.cpu import attention as cpu_attention
from train.runtime import keep_freed_memory


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    tokens: int = 4096
    """Tokens in total; at least one sequence."""
    lengths: list[int] = field(default_factory=lambda: [256, 1024, 4096, 16384])
    """Tokens per sequence."""
    heads: int = 8
    """Query heads."""
    groups: int = 4
    """Key/value heads."""
    channels: int = 64
    """Channels per head."""
    rounds: int = 7
    """Turns of each contender."""
    repeats: int = 2
    """Passes per turn."""


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_attention", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)


def build(options: BenchmarkConfig, length: int, *, ours: bool) -> Run:
    """Forward and backward of one attention layer, on tensors with Megatron-Core's memory layout."""
    keep_freed_memory()
    sequences = max(1, options.tokens // length)
    heads = options.heads, options.groups, options.groups
    qkv = [torch.randn(length, sequences, n, options.channels).requires_grad_() for n in heads]
    target = torch.randn(length, sequences, options.heads, options.channels)

    def run() -> None:
        if ours:
            context = cpu_attention.attend(*qkv)
        else:
            q, k, v = (x.permute(1, 2, 0, 3) for x in qkv)
            context = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)
        torch.autograd.grad(context, qkv, target)

    return run


@command("benchmark_attention", path=None)
def main(hydra_config: DictConfig) -> None:
    """Print the time of torch and the ratio of ours to it."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    print(f"{options.heads} heads of {options.channels}, {options.groups} groups, fp32, {torch.get_num_threads()} threads")
    print("  sequences x tokens   torch's ms   ours / it")
    for length in options.lengths:
        contenders = {who: functools.partial(build, options, length, ours=who == "ours") for who in ("ours", "torch's")}
        seconds = time_interleaved(contenders, options.rounds, options.repeats)
        sequences, torchs = max(1, options.tokens // length), seconds["torch's"]
        print(f"  {sequences:9} x {length:6} {1000 * statistics.median(torchs):12.1f}   {ratio(seconds['ours'], torchs)}")


if __name__ == "__main__":
    main()
