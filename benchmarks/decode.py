"""Benchmarks the routed experts of one token, forward only: our sparse experts, dense experts, and memory reads as a bound.

    python -m benchmarks.decode
    python -m benchmarks.decode width=1024 neurons=480 experts=32 topk=4 dtype=bf16

A token passes through different experts in each layer. Together they are far larger than the caches, as in text generation,
so reading weights dominates the time. The contenders: torch, with matrix products for each selected expert in two layouts;
transformers, with each implementation of the Qwen3-MoE experts. The bound is the time to read only the required weights: the
gate weights at the speed of `read`, a sequential pass over memory, and the rows of the kept neurons in up and down at the
speed of torch's embedding_bag, which sums scattered rows.
"""

import functools
import itertools
import statistics
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, Run, ratio, time_interleaved
from mone_common.console import command, to_dataclass
from mone_model.kernels.cpu import experts as cpu


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    width: int = 512
    """Model width D."""
    neurons: int = 512
    """Neurons H of an expert."""
    experts: int = 16
    """Experts per layer."""
    topk: int = 2
    """Experts per token."""
    layers: int = 8
    """Number of layers."""
    ratios: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25, 0.1])
    """Shares of neurons kept."""
    dtype: str = "fp32"
    """fp32 or bf16: weights and activations."""
    rounds: int = 9
    """Turns of each contender."""
    repeats: int = 300
    """Tokens per turn."""


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_decode", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Layer = tuple[torch.Tensor, torch.Tensor]


def weights_of(options: BenchmarkConfig) -> list[Layer]:
    """Gate and up [E, 2, H, D], down [E, H, D] of each layer."""
    torch.manual_seed(0)
    experts, neurons, width, dtype = options.experts, options.neurons, options.width, DTYPES[options.dtype]
    return [
        (
            torch.randn(experts, 2, neurons, width).mul_(width**-0.5).to(dtype),
            torch.randn(experts, neurons, width).mul_(neurons**-0.5).to(dtype),
        )
        for _ in range(options.layers)
    ]


def choices(options: BenchmarkConfig) -> list[list[int]]:
    """Random experts of a token, one list for each layer it passes."""
    generator = torch.Generator().manual_seed(1)
    return [sorted(torch.randperm(options.experts, generator=generator)[: options.topk].tolist()) for _ in range(997)]


@torch.no_grad()
def build_ours(options: BenchmarkConfig, share: float, by_threshold: bool) -> Run:
    """Our experts; by_threshold: with a threshold that keeps this share of neurons on average."""
    layers, k = weights_of(options), round(share * options.neurons)
    chosen = [torch.bincount(torch.tensor(experts), minlength=options.experts) for experts in choices(options)]
    tokens_E = itertools.cycle(chosen)
    x_ND = torch.randn(1, options.width).to(DTYPES[options.dtype]).expand(options.topk, -1).contiguous()
    probs_N = torch.full((options.topk,), 1 / options.topk)
    gates = F.silu(layers[0][0][:, 0].flatten(0, 1).float() @ x_ND[0].float()).abs()
    threshold = float(gates.quantile(1 - share)) if by_threshold else None

    @torch.no_grad()
    def run() -> None:
        for gate_up, down in layers:
            cpu.decode(x_ND, gate_up, down, probs_N, next(tokens_E), k, "silu", threshold=threshold)

    return run


@torch.no_grad()
def build_torch(options: BenchmarkConfig, *, transposed: bool) -> Run:
    """Dense experts with torch's matrix products; transposed: weights [in, out] instead of [out, in]."""
    x = torch.randn(1, options.width).to(DTYPES[options.dtype])
    chosen = itertools.cycle(choices(options))
    layers: list[list[Layer]] = []
    for gate_up, down in weights_of(options):
        pairs = [(a.flatten(0, 1), b.T) for a, b in zip(gate_up, down, strict=True)]
        layers.append([(a.T.contiguous().T, b.T.contiguous().T) if transposed else (a, b.contiguous()) for a, b in pairs])

    @torch.no_grad()
    def run() -> None:
        for experts in layers:
            y = torch.zeros_like(x)
            for e in next(chosen):
                gate, up = F.linear(x, experts[e][0]).chunk(2, dim=-1)
                y += F.linear(F.silu(gate) * up, experts[e][1]) / options.topk

    return run


@torch.no_grad()
def build_transformers(options: BenchmarkConfig, implementation: str) -> Run:
    """The experts of Qwen3-MoE in transformers."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=options.width, num_experts=options.experts, moe_intermediate_size=options.neurons)
    config._experts_implementation = implementation
    modules = []
    for gate_up, down in weights_of(options):
        module = Qwen3MoeExperts(config).to(DTYPES[options.dtype]).eval()
        module.gate_up_proj.copy_(gate_up.flatten(1, 2))
        module.down_proj.copy_(down.transpose(1, 2))
        modules.append(module)
    x = torch.randn(1, options.width).to(DTYPES[options.dtype])
    weights = torch.full((1, options.topk), 1 / options.topk)
    indices = itertools.cycle([torch.tensor([experts]) for experts in choices(options)])

    @torch.no_grad()
    def run() -> None:
        for module in modules:
            module(x, next(indices), weights)

    return run


def build_read(options: BenchmarkConfig) -> Run:
    """Read as many bytes as the selected experts have, from a buffer of the size of all experts."""
    memory = _rows_of_all(options).flatten()
    part = len(memory) * options.topk // options.experts
    starts = itertools.cycle(range(0, len(memory) - part + 1, part))

    def run() -> None:
        start = next(starts)
        memory[start : start + part].sum()

    return run


def build_read_kept(options: BenchmarkConfig, share: float) -> Run:
    """Sum the rows of the kept neurons in up and down of the selected experts of all layers."""
    memory, neurons = _rows_of_all(options), options.neurons
    generator = torch.Generator().manual_seed(2)

    def of_a_token(chosen: list[int]) -> list[torch.Tensor]:
        return [
            torch.randperm(neurons, generator=generator)[: round(share * neurons)].sort().values
            + ((layer * options.experts + expert) * 3 + matrix) * neurons
            for layer in range(options.layers)
            for expert in chosen
            for matrix in (1, 2)
        ]

    tokens = [of_a_token(chosen) for chosen in choices(options)[:50]]
    rows = itertools.cycle([torch.stack(lists) for lists in tokens])

    def run() -> None:
        F.embedding_bag(next(rows), memory, mode="sum")

    return run


def _rows_of_all(options: BenchmarkConfig) -> torch.Tensor:
    """One row of equal size in bytes for each neuron's gate, up and down in all layers; fp32 is fast for all readers."""
    rows = 3 * options.layers * options.experts * options.neurons
    return torch.ones(rows, options.width * DTYPES[options.dtype].itemsize // 4)


@command("benchmark_decode", path=None)
def main(hydra_config: DictConfig) -> None:
    """Print the time of each contender, and the ratios of the best dense experts and of the bound to it."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    of = functools.partial
    contenders: dict[str, functools.partial[Run]] = {
        "torch": of(build_torch, options, transposed=False),
        "torch, transposed": of(build_torch, options, transposed=True),
        **{f"transformers, {name}": of(build_transformers, options, name) for name in ("eager", "batched_mm", "grouped_mm")},
    }
    dense = list(contenders)
    ours = {f"ours {share:g}{', threshold' * by}": (share, by) for share in options.ratios for by in (False, True)}
    contenders |= {name: of(build_ours, options, share, by) for name, (share, by) in ours.items() if share < 1 or not by}
    contenders["read"] = of(build_read, options)
    contenders |= {f"read kept {share:g}": of(build_read_kept, options, share) for share in options.ratios if share < 1}
    seconds = time_interleaved(contenders, options.rounds, options.repeats)
    best = min(dense, key=lambda name: statistics.median(seconds[name]))
    weights = 3 * options.layers * options.topk * options.neurons * options.width * DTYPES[options.dtype].itemsize
    print(f"one token, D {options.width}, H {options.neurons}, {options.topk} of {options.experts} experts, ", end="")
    print(f"{options.layers} layers, {options.dtype}, {torch.get_num_threads()} threads; best dense: {best}")
    speed = weights / statistics.median(seconds["read"]) / 1e9
    print(f"dense: {weights / 2**20:.0f} MiB of weights; read at {speed:.1f} GB/s")
    for name, times in seconds.items():
        line = f"  {name:28} {1000 * statistics.median(times):7.2f} ms"
        if not name.startswith("read"):
            line += f"   best dense / it: {ratio(seconds[best], times)}"
        if name in ours:
            share = ours[name][0]
            bound = seconds["read"]
            if share < 1:
                bound = [all_ / 3 + kept for all_, kept in zip(bound, seconds[f"read kept {share:g}"], strict=True)]
            line += f"   bound / it: {ratio(bound, times)}"
        print(line)


if __name__ == "__main__":
    main()
