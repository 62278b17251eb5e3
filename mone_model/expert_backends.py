"""How the experts are computed on this machine: `compute.experts`, and the measurement behind `auto`.

grouped  one grouped GEMM for the gates and ups of all experts, one for down; the neurons between them are selected
loop     the same with a GEMM for each expert
sparse   the gates as before, up, down and the backward pass only of neurons that are kept (`mone_model.kernels.cpu.experts`)

method = choose_backend(model, ParallelConfig(), compute)
"""

import functools
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mone_common.checks import check
from mone_model.activations import ACTIVATIONS
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.kernels.cpu import experts as cpu
from mone_model.neuron_selection import select_and_gate


def expert_gemm(x_NK: torch.Tensor, weight_EKM: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
    """One grouped GEMM: rows of expert e times weight[e]. [N, K], [E, K, M], [E] -> [N, M]."""
    if len(x_NK) == 0:
        # The grouped GEMM's backward refuses an empty batch; this keeps the weights in the graph.
        return x_NK @ weight_EKM[0]
    offsets_E = tokens_E.cumsum(0).to(device=x_NK.device, dtype=torch.int32)
    return F.grouped_mm(x_NK, weight_EKM, offs=offsets_E)


def expert_gemm_loop(x_NK: torch.Tensor, weight_EKM: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
    """What `expert_gemm` means: one GEMM for each expert."""
    rows = x_NK.split(tokens_E.tolist())
    return torch.cat([x @ weight for x, weight in zip(rows, weight_EKM, strict=True)])


GEMMS = {"grouped": expert_gemm, "loop": expert_gemm_loop}


def choose_backend(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig) -> str:
    """The method for these experts on this machine; ValueError if `compute.experts=sparse` cannot be had."""
    if compute.experts in GEMMS:
        return compute.experts
    obstacle = why_not_sparse(model, parallel, compute)
    if obstacle is None and torch.cuda.is_available():
        obstacle = "there are no kernels for GPUs"
    if obstacle is None and not cpu.available():
        obstacle = "its kernels could not be built here"
    if compute.experts == "sparse":
        check_sparse(compute, obstacle)
        return "sparse"
    if torch.cuda.is_available():
        return "grouped"
    parts = parallel.expert_tensor
    shape = (model.hidden_size, model.moe_ffn_hidden_size // parts, max(1, model.active_neurons // parts))
    return measure(*shape, model.activation, compute.dtype, skipping=obstacle is None).fastest


def why_not_sparse(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig) -> str | None:
    """What in the configuration forbids `compute.experts=sparse`, if anything."""
    if compute.precision != "fp32":
        return f"needs compute.precision=fp32, not {compute.precision}"
    if model.hidden_size % cpu.WORD != 0:
        return f"needs model.hidden_size to be a multiple of {cpu.WORD}, not {model.hidden_size}"
    if parallel.expert_tensor > 1:
        return f"needs whole experts: parallel.expert_tensor=1, not {parallel.expert_tensor}"
    return None


def check_sparse(compute: ComputeConfig, obstacle: str | None) -> None:
    """ValueError if sparse is asked for and something forbids it."""
    check(
        compute.experts != "sparse" or obstacle is None,
        "compute.experts",
        "sparse",
        f"{obstacle}; auto takes another method",
    )


def compute_experts(
    method: str,
    x_ND: torch.Tensor,
    gate_up_E2HD: torch.Tensor,
    down_EHD: torch.Tensor,
    probs_N: torch.Tensor,
    tokens_E: torch.Tensor,
    kept: int,
    activation: str,
) -> torch.Tensor:
    """The weighted outputs [N, D] of the experts and nothing else: without counters, losses and ranks."""
    if method == "sparse":
        return cpu.experts(x_ND, gate_up_E2HD, down_EHD, probs_N, tokens_E, kept, activation, counting=False).out_ND
    gate_NH, up_NH = GEMMS[method](x_ND, gate_up_E2HD.flatten(1, 2).transpose(1, 2), tokens_E).chunk(2, dim=-1)
    if kept < gate_NH.size(1):
        hidden_NH = select_and_gate(gate_NH, up_NH, probs_N, kept, activation).hidden_NH
    else:
        hidden_NH = (ACTIVATIONS[activation].function(gate_NH) * up_NH * probs_N[:, None]).to(x_ND.dtype)
    return GEMMS[method](hidden_NH, down_EHD, tokens_E)


@dataclass(frozen=True)
class Measured:
    """Seconds of a forward and backward pass by method."""

    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """The first method, unless a later one is faster by more than noise: results depend on it in their rounding."""
        best = next(iter(self.seconds))
        for method, seconds in self.seconds.items():
            if seconds < 0.85 * self.seconds[best]:
                best = method
        return best


@functools.cache
def measure(
    width: int,
    neurons: int,
    kept: int,
    activation: str,
    dtype: torch.dtype,
    *,
    skipping: bool,
) -> Measured:
    """Time each method on random experts of this shape, 256 tokens for each; the best of interleaved rounds."""
    experts, rows = 4, 256
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).mul_(width**-0.5).requires_grad_()

    tokens_E = torch.full((experts,), rows)
    inputs = random(experts * rows, width), random(experts, 2, neurons, width), random(experts, neurons, width)
    probs_N = torch.rand(experts * rows, generator=generator).requires_grad_()

    seconds = dict.fromkeys([*GEMMS, "sparse"] if skipping else GEMMS, math.inf)
    with torch.enable_grad():
        for _ in range(4):
            for method in seconds:
                start = time.perf_counter()
                output_ND = compute_experts(method, *inputs, probs_N, tokens_E, kept, activation)
                torch.autograd.grad(output_ND, [*inputs, probs_N], torch.ones_like(output_ND))
                seconds[method] = min(seconds[method], time.perf_counter() - start)
    return Measured(seconds)


@torch.no_grad()
def measure_max_decode_rows(width: int, neurons: int, kept: int, activation: str, dtype: torch.dtype, method: str) -> int:
    """Up to how many rows (tokens times their experts) `cpu.decode` is faster here than this method; 0: never.

    The weights that are passed through are larger than caches, as those of a model that writes text are.
    """
    size = 3 * neurons * width * dtype.itemsize
    experts = min(16, max(2, _BEYOND_CACHES // size))
    layers = min(8, max(1, _BEYOND_CACHES // (experts * size)))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(width**-0.5).to(dtype)

    first = random(experts, 2, neurons, width), random(experts, neurons, width)
    weights = [first, *((first[0].clone(), first[1].clone()) for _ in range(layers - 1))]
    fastest = 0
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        x_ND, probs_N, tokens_E = random(rows, width), torch.ones(rows), torch.zeros(experts, dtype=torch.long)
        for row in range(rows):
            tokens_E[row % experts] += 1
        few = dense = math.inf
        for _ in range(3):
            start = time.perf_counter()
            for layer in weights:
                cpu.decode(x_ND, *layer, probs_N, tokens_E, kept, activation)
            middle = time.perf_counter()
            for layer in weights:
                compute_experts(method, x_ND, *layer, probs_N, tokens_E, kept, activation)
            few, dense = min(few, middle - start), min(dense, time.perf_counter() - middle)
        if few > dense:
            break
        fastest = rows
    return fastest


_BEYOND_CACHES = 2**27  # bytes
