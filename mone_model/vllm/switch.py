"""Which backend computes a number of rows fastest on this machine, measured at start-up.

    fastest = measure(1024, 768, 64, 192, "silu", torch.bfloat16, backends=("loop", "decode"), isa=None)
    fastest(4)          # "decode"

A row is a token in one of its experts. Shapes: R rows, D width, H neurons on this rank, E experts.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from mone_model.expert_backends import BACKENDS, DENSE_BACKENDS, Request, Rule, Weights, random_layers, route, rows_alike
from mone_model.kernels.cpu import library
from mone_model.neuron_selection import TopK

STOCK = "vllm"
"""vLLM's own operator, beside the names of `BACKENDS`."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""The numbers of rows that are measured, in the experts of `random_layers`."""


class Switch(NamedTuple):
    """The fastest backend by the number of rows."""

    fastest: tuple[str, ...]
    """For each number of `sizes`."""
    sizes: tuple[int, ...]
    """Numbers of rows in all experts, ascending."""

    def __call__(self, rows: int) -> str:
        """The name of the backend for so many rows: that of the next larger size."""
        index = next((index for index, size in enumerate(self.sizes) if rows <= size), -1)
        return self.fastest[index]

    def __str__(self) -> str:
        """Where it changes, for the log."""
        parts: list[str] = []
        last = len(self.sizes) - 1
        for index, (size, name) in enumerate(zip(self.sizes, self.fastest, strict=True)):
            if index == last:
                parts.append(f"{name} above" if parts else name)
            elif name != self.fastest[index + 1]:
                parts.append(f"{name} up to {size} rows")
        return ", ".join(parts)


def usable_backends(width: int, dtype: torch.dtype, rule: Rule) -> tuple[str, ...]:
    """The backends that can compute experts on CPUs by this rule; the first is preferred if others are not faster."""
    if isinstance(rule, TopK) and rule.group is not None:
        return DENSE_BACKENDS
    kernels = width % library.WORD == 0 and dtype in library.DTYPES and library.available()
    sparse = kernels and dtype == torch.float32 and isinstance(rule, TopK)
    return (*DENSE_BACKENDS, *(("sparse",) if sparse else ()), *(("decode",) if kernels else ()))


@functools.cache
@torch.inference_mode()
def measure(
    width: int,
    neurons: int,
    experts: int,
    k: int,
    activation: str,
    dtype: torch.dtype,
    *,
    backends: tuple[str, ...],
    isa: str | None,
) -> Switch:
    """Time the backends on random experts that keep k neurons, for each of `SIZES`; the best of interleaved rounds.

    isa: also time vLLM's operator, which computes all neurons, with these instructions; only for activations that it has.
    """
    layers = random_layers(width, neurons, experts, dtype)
    request = Request(TopK(k), activation)
    candidates: dict[str, Callable[[Weights, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
        name: lambda weights, x_RD, experts_R1, probs_R1, name=name: route(  # type: ignore[misc]
            BACKENDS[name], weights, x_RD, experts_R1, probs_R1, request
        )
        for name in backends
    }
    if isa is not None:
        packed = {id(weights): pack(weights, isa) for weights in layers}
        candidates = {
            STOCK: lambda weights, x_RD, experts_R1, probs_R1: fused_moe(
                *packed[id(weights)], x_RD, experts_R1, probs_R1, activation, isa
            ),
            **candidates,
        }
    fastest = tuple(_fastest(candidates, layers, rows) for rows in SIZES)
    return Switch(fastest, tuple(rows_alike(rows, len(layers[0].down_EHD), experts) for rows in SIZES))


def _fastest(candidates: dict[str, Callable[..., torch.Tensor]], layers: list[Weights], rows: int) -> str:
    experts, width = layers[0].down_EHD.size(0), layers[0].down_EHD.size(2)
    generator = torch.Generator().manual_seed(0)  # the server's own random numbers stay as they are
    x_RD = torch.randn(rows, width, generator=generator).to(layers[0].down_EHD.dtype)
    experts_R1, probs_R1 = (torch.arange(rows) % experts)[:, None], torch.ones(rows, 1)
    seconds = dict.fromkeys(candidates, math.inf)
    for _ in range(3):
        for name, compute in candidates.items():
            start = time.perf_counter()
            for weights in layers:
                compute(weights, x_RD, experts_R1, probs_R1)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    best = next(iter(seconds))
    for name, its in seconds.items():
        if its < 0.97 * seconds[best]:  # by more than noise
            best = name
    return best


def pack(weights: Weights, isa: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights as vLLM's operator reads them: a copy."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    gate_up_E2HD, down_EHD = weights
    down_EDH = down_EHD.transpose(1, 2).contiguous()
    return cpu_prepack_moe_weight(gate_up_E2HD.flatten(1, 2), isa), cpu_prepack_moe_weight(down_EDH, isa)


def fused_moe(
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x_TD: torch.Tensor,
    experts_Tk: torch.Tensor,
    probs_Tk: torch.Tensor,
    activation: str,
    isa: str,
) -> torch.Tensor:
    """[T, D] the experts with all neurons, by vLLM's operator, from weights of `pack`."""
    from vllm._custom_ops import cpu_fused_moe

    out_TD = torch.empty_like(x_TD)
    probs_Tk, experts_Tk = probs_Tk.float().contiguous(), experts_Tk.int().contiguous()
    cpu_fused_moe(out_TD, x_TD, gate_up, down, None, None, probs_Tk, experts_Tk, activation, isa, False)
    return out_TD
