"""The kernels for a few rows against references, the expert backends against `loop`, and CUDA graphs.

for record in check_lists("bf16", "silu", SMALL, device="cuda"):
    print(record["name"], record["passed"], record["worst"])       # lists silu bf16 H=37 K=5  True  0.02

Errors and shapes as in `benchmarks.gpu.checks`; E experts, D width, T tokens, S slots of a list.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.checks import (
    ABSOLUTE,
    DTYPES,
    TINY,
    Errors,
    Guarded,
    Inputs,
    Shape,
    compare_choice,
    make_inputs,
    recorded,
    share_of,
)
from benchmarks.gpu.isolation import Record
from benchmarks.gpu.operator_checks import use_interpreted_kernels
from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import BACKENDS, Request, Rule, Weights
from mone_model.neuron_selection import TopK, scores_of, select_neurons_reference
from mone_model.thresholds import AtLeast

# Of sums of products, by their norms; rounding of the result is the largest part.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
THRESHOLDS = (0.0, 0.4, math.inf)


def check_lists(
    dtype: str, activation: str, shapes: tuple[Shape, ...], device: str, kernels: Any = None
) -> Iterator[Record]:
    """A record for each shape and rule: the K best, and all that reach a threshold."""
    if kernels is None:
        from mone_model.kernels.triton import decode as kernels
    for shape in shapes:
        inputs = make_inputs(shape, DTYPES[dtype], 0, device)
        rules: list[Rule] = [*map(TopK, shape.ks), *map(AtLeast, THRESHOLDS)]
        for rule in rules:
            how = f"K={rule.k}" if isinstance(rule, TopK) else f"threshold {rule.threshold:g}"
            name = f"lists {activation} {dtype} H={shape.neurons} {how}"
            yield recorded(name, functools.partial(compare_lists, kernels, inputs, rule, activation))


def compare_lists(kernels: Any, inputs: Inputs, rule: Rule, activation: str) -> Errors:
    """Errors of `kernels.select_rows`."""
    names, gate_NH, _, probs_N, _ = inputs
    rows, neurons = gate_NH.shape
    active_NH = ACTIVATIONS[activation].function(gate_NH.float().clamp_min(torch.finfo(torch.float32).min))
    if isinstance(rule, TopK):
        options: dict[str, Any] = {"k": rule.k}
        right_mask_NH, border_N = select_neurons_reference(active_NH, rule.k)
        border_N1 = border_N[:, None]
    else:
        options = {"k": 0, "threshold": rule.threshold}
        right_mask_NH = scores_of(active_NH) >= rule.threshold
        border_N1 = active_NH.new_full((rows, 1), rule.threshold)

    errors = Errors(names)
    experts_N = torch.arange(rows, dtype=torch.int32, device=gate_NH.device) % 3
    experts_N[-1] = -1  # a row of another rank
    right_mask_NH[-1] = False
    with Guarded() as guard:
        ids_NS, values_NS, counts_N = kernels.select_rows(gate_NH, probs_N, experts_N, activation=activation, **options)
    slots = ids_NS.size(1)
    in_list_NS = torch.arange(slots, device=gate_NH.device) < counts_N[:, None]
    ids_NS = torch.where(in_list_NS, ids_NS, neurons).long()
    before_NS = torch.nn.functional.pad(ids_NS, (1, 0), value=-1)[:, :-1]
    ordered_NS = ~in_list_NS | ((ids_NS > before_NS) & (ids_NS < neurons))
    right_counts_N = right_mask_NH.sum(1) if isinstance(rule, TopK) else counts_N
    errors.require("lists", ordered_NS & ((counts_N == right_counts_N) & (counts_N <= slots))[:, None])
    errors.require("inside its results", torch.full((rows, 1), guard.intact(), device=gate_NH.device))
    if any(found["share"] > 0 for found in errors.found.values()):
        return errors  # nothing else can be looked up

    mask_NH = torch.zeros(rows, neurons + 1, dtype=torch.bool, device=gate_NH.device).scatter_(1, ids_NS, True)[:, :neurons]
    compare_choice(errors, gate_NH, mask_NH, right_mask_NH, border_N1, activation)
    right_NS = (active_NH * probs_N.float()[:, None]).gather(1, ids_NS.clamp_max(neurons - 1))
    allowed_NS = 1e-5 * right_NS.abs() + (ABSOLUTE if activation == "gelu" else TINY)
    # Torch's GELU of infinity is NaN on a CPU.
    compared_NS = in_list_NS & ~gate_NH.gather(1, ids_NS.clamp_max(neurons - 1)).isinf()
    errors.add("values", share_of(values_NS, right_NS, allowed_NS), compared_NS)
    return errors


def check_products(dtype: str, width: int, neurons: int, device: str, kernels: Any = None) -> Iterator[Record]:
    """Up and down of random lists against float64, for 1 to 64 rows, one and several of them for a token."""
    if kernels is None:
        from mone_model.kernels.triton import decode as kernels
    for tokens, topk in ((1, 1), (1, 8), (3, 2), (16, 1), (32, 2)):
        name = f"up and down {dtype} D={width} H={neurons}, {tokens} tokens in {topk} experts"
        shape = (width, neurons, tokens, topk)
        yield recorded(name, functools.partial(compare_products, kernels, DTYPES[dtype], *shape, device))


def compare_products(
    kernels: Any, dtype: torch.dtype, width: int, neurons: int, tokens: int, topk: int, device: str
) -> Errors:
    """Errors of `kernels.up_down`, by token; two runs must give the same bits, and each token alone, too."""
    from mone_model.kernels.triton.decode import Kept

    generator, rows, experts = torch.Generator().manual_seed(tokens), tokens * topk, 5
    counts_N = torch.randint(0, neurons + 1, (rows,), generator=generator, dtype=torch.int32)
    counts_N[0] = neurons
    experts_N = torch.randint(experts, (rows,), generator=generator, dtype=torch.int32)
    order_NH = torch.rand(rows, neurons, generator=generator).argsort(1)
    in_list_NH = torch.arange(neurons) < counts_N[:, None]
    ids_NH = order_NH.masked_fill(~in_list_NH, neurons).sort(1).values
    values_NH = torch.randn(rows, neurons, generator=generator).masked_fill(~in_list_NH, math.nan)

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(scale).to(device, dtype)

    x_TD, down_EHD = random(tokens, width, scale=1), random(experts, neurons, width, scale=neurons**-0.5)
    gate_up_E2HD = random(experts, 2, neurons, width, scale=width**-0.5)
    gate_up_E2HD[:, 0] = math.nan  # not to be read
    experts_N, kept = experts_N.to(device), Kept(ids_NH.int().to(device), values_NH.to(device), counts_N.to(device))
    weights = gate_up_E2HD, down_EHD
    with Guarded() as guard:
        out_TD = kernels.up_down(x_TD, *weights, experts_N, kept)
    again_TD = kernels.up_down(x_TD, *weights, experts_N, kept)
    some = slice(tokens // 2 * topk, (tokens // 2 + 1) * topk)
    token, its = slice(tokens // 2, tokens // 2 + 1), Kept(*(part[some] for part in kept))
    alone_1D = kernels.up_down(x_TD[token], *weights, experts_N[some], its)

    right_TD = torch.zeros(tokens, width, dtype=torch.float64, device=device)
    for row, (expert, count) in enumerate(zip(experts_N.tolist(), counts_N.tolist(), strict=True)):
        ids, values = kept.ids_NS[row, :count].long(), kept.values_NS[row, :count].double()
        up_nD, down_nD = gate_up_E2HD[expert, 1, ids].double(), down_EHD[expert, ids].double()
        right_TD[row // topk] += (up_nD @ x_TD[row // topk].double() * values) @ down_nD
    errors = Errors([f"token {token}" for token in range(tokens)])
    distance_T1 = (out_TD.double() - right_TD).norm(dim=1, keepdim=True)
    errors.add("out", distance_T1 / (ALLOWED[dtype] * right_TD.norm(dim=1, keepdim=True) + TINY))
    errors.require("same bits again", out_TD == again_TD)
    errors.require("same bits alone", out_TD[token] == alone_1D)
    errors.require("inside its results", torch.tensor([[guard.intact()]]))
    return errors


def check_backends(
    device: str, dtypes: tuple[str, ...], width: int, neurons: int, rows: tuple[int, int]
) -> Iterator[Record]:
    """`grouped` (with gradients) and `decode` against `loop`; rows: the most for each."""
    use_interpreted_kernels()
    for dtype in dtypes:
        for backend, number, rules in (
            ("grouped", rows[0], (TopK(neurons), TopK(neurons // 4))),
            ("decode", 1, (TopK(neurons // 4),)),
            ("decode", 7, (TopK(neurons // 4), AtLeast(0.5))),
            ("decode", rows[1], (TopK(neurons), TopK(neurons // 4), TopK(neurons // 10), AtLeast(0.5))),
        ):
            for rule in rules:
                how = f"ratio {rule.k / neurons:.3g}" if isinstance(rule, TopK) else f"threshold {rule.threshold:g}"
                name = f"{backend} against loop, {dtype}, {how}, {number} rows"
                check = functools.partial(compare_backend, backend, device, DTYPES[dtype], width, neurons, rule, number)
                yield recorded(name, check)


def compare_backend(
    backend: str, device: str, dtype: torch.dtype, width: int, neurons: int, rule: Rule, rows: int
) -> Errors:
    """A backend against `loop`, by norms.

    Gates are sums of products of small integers: exact in any order. So all backends must select the same neurons.
    """
    generator = torch.Generator().manual_seed(rows)
    tokens_E = torch.bincount(torch.randint(6, (rows,), generator=generator), minlength=8)  # two experts have none

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(scale)

    def small(*shape: int, scale: float) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator) * scale

    scale = 2.0 ** -round(math.log2(2 * width**0.5))
    gate_up_E2HD = torch.stack([small(8, neurons, width, scale=scale), random(8, neurons, width, scale=width**-0.5)], dim=1)
    values = small(rows, width, scale=1), gate_up_E2HD, random(8, neurons, width, scale=neurons**-0.5)
    x_ND, gate_up_E2HD, down_EHD = (value.to(device, dtype).requires_grad_() for value in values)
    probs_N = torch.rand(rows, generator=generator).to(device).requires_grad_()
    dout_ND, tokens_E = random(rows, width, scale=1).to(device, dtype), tokens_E.to(device)
    inputs = [x_ND, gate_up_E2HD, down_EHD, probs_N]
    found = {}
    for name in (backend, "loop"):
        with torch.set_grad_enabled(backend != "decode"):
            weights = Weights(gate_up_E2HD, down_EHD)
            out_ND = BACKENDS[name].compute(weights, x_ND, tokens_E, probs_N, Request(rule, "silu")).out_ND
            gradients = torch.autograd.grad(out_ND, inputs, dout_ND) if backend != "decode" else ()
        found[name] = (out_ND.detach(), *gradients)
    errors = Errors(["all"])
    for name, result, right in zip(
        ("out", "dx", "dgate_up", "ddown", "dprobs"), found[backend], found["loop"], strict=False
    ):
        distance = (result.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30)
        # Both round.
        errors.add(name, (distance / (2 * ALLOWED[dtype])).view(1, 1))
    return errors


def check_graphs(width: int, neurons: int) -> Iterator[Record]:
    """A CUDA graph of the kernels, replayed with other inputs, against the kernels without one; in all dtypes."""
    for dtype in DTYPES:
        yield recorded(f"CUDA graph, {dtype}", functools.partial(compare_graph, DTYPES[dtype], width, neurons))


def compare_graph(dtype: torch.dtype, width: int, neurons: int) -> Errors:
    """The bits must be equal: lists have other lengths than at the capture, and experts are others."""
    from mone_model.kernels.triton import decode

    rows, experts = 16, 6
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, scale: float = 1) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda").mul_(scale).to(dtype)

    weights = random(experts, 2, neurons, width, scale=width**-0.5), random(experts, neurons, width, scale=neurons**-0.5)
    x_TD, gate_NH = random(rows // 2, width), random(rows, neurons)
    probs_N = torch.rand(rows, generator=generator, device="cuda")
    experts_N = torch.randint(experts, (rows,), generator=generator, device="cuda", dtype=torch.int32)

    def compute(threshold: float | None) -> torch.Tensor:
        kept = decode.select_rows(gate_NH, probs_N, experts_N, neurons // 4, "silu", threshold=threshold)
        return decode.up_down(x_TD, *weights, experts_N, kept)

    errors = Errors(["all"])
    for name, threshold in (("the K best", None), ("threshold", 0.4)):
        compute(threshold)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_TD = compute(threshold)
        x_TD.copy_(random(rows // 2, width))
        gate_NH.copy_(random(rows, neurons, scale=2))
        experts_N.copy_(experts_N.flip(0))
        experts_N[3] = -1
        graph.replay()
        errors.require(name, (out_TD == compute(threshold)).flatten()[None])
    return errors
