"""The Triton kernels against `select_and_gate_reference` and its gradients, on rows that are hard to select from.

for record in check_selection("bf16", "silu", SMALL, repeats=8, device="cuda"):
    print(record["name"], record["passed"], record["worst"])       # silu bf16 H=37 K=5  True  0.31

An error is given as a share of what is allowed: above 1 the check fails.

Shapes: N rows, H neurons, K kept, W words of a packed mask.
"""

import functools
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.isolation import Record
from mone_model.activations import ACTIVATIONS
from mone_model.neuron_selection import pack, scores_of, select_and_gate_reference, unpack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of values in 16 bits: a last bit. Triton's interpreter cuts fp32 to bf16 where a GPU rounds.
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Slopes, and the negative side of GELU, are differences of larger numbers.
ABSOLUTE = 1e-5
# Below it, sums and quotients of fp32 may differ in few bits or be flushed to 0.
TINY = 1e-37
# Gates around which exponentials leave the range of fp32.
EXTREMES = [s * x for x in (0.0, 1e-38, 40.0, 87.4, 88.5, 88.71, 88.8, 103.0, 1e4, 1e19, 1e38) for s in (-1.0, 1.0)]

GUARD, GUARD_CELLS = 85, 64


class Shape(NamedTuple):
    """Rows of `neurons` neurons; one check for each number K of kept neurons in `ks`."""

    neurons: int
    ks: tuple[int, ...]
    halves: bool = False
    """Whether gate and up are the halves of one tensor, and weights have their dtype: else all is contiguous."""


# The first has a last word that is not full; in all of the second, sizes and addresses are multiples of 16.
SMALL = (Shape(37, (1, 5, 36, 37)), Shape(96, (48, 96), halves=True))
# Each is one of the blocks for which the kernels are compiled; 16384 is MAX_NEURONS.
LONG = tuple(
    Shape(neurons, (neurons // 8, neurons // 2, neurons), halves) for neurons, halves in
    ((512, True), (1000, False), (1408, True), (4096, True), (14336, True), (16384, False))
)  # fmt: skip


class Inputs(NamedTuple):
    """What a kernel is called with."""

    names: list[str]
    """Of the N rows."""
    gate_NH: torch.Tensor
    up_NH: torch.Tensor
    probs_N: torch.Tensor
    dhidden_NH: torch.Tensor
    """Gradient of the result."""


def make_gates(neurons: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Rows of gates by name, [H] each."""
    nan, infinity, limits = math.nan, math.inf, torch.finfo(dtype)
    random, other = torch.randn(2, neurons, generator=generator)
    distinct = torch.randint(-3, 4, (neurons,), generator=generator)
    # A multiple of 8 steps stays exact when an activation halves it.
    denormal = torch.randint(-15, 16, (neurons,), generator=generator) * (8 * limits.tiny * limits.eps)
    outliers = random.clone()
    outliers[::50] *= 2**14
    largest = min(1e37, limits.max / 4)

    def repeated(*values: float) -> torch.Tensor:
        return torch.tensor(values).repeat(-(-neurons // len(values)))[:neurons]

    rows = {
        "normal": random,
        "normal again": other,
        "few distinct values": distinct * 0.75,
        "equal": torch.full((neurons,), 1.5),
        "zeros": torch.zeros(neurons),
        "zeros of both signs": repeated(0.0, -0.0),
        "denormals": denormal,
        "smallest normal numbers": random * limits.tiny * 16,
        "huge": random.sign() * (largest * torch.rand(neurons, generator=generator)),
        "many magnitudes": random * (4 * other).exp(),
        "outliers": outliers,
        "ascending": torch.linspace(-4, 4, neurons),
        "descending": torch.linspace(4, -4, neurons),
        "negative": -8 * random.abs(),
        "exponentials at their limits": repeated(*EXTREMES).clamp(-largest, largest),
        "NaN": repeated(nan),
        "some NaN": repeated(nan, 1.0, -nan, 2.0, 0.5),
        "some infinite": repeated(infinity, -infinity, 1.0),
        "all infinite": repeated(infinity),
        "NaN and infinite": repeated(-nan, infinity, 3.0),
        "NaN as weight": random,
        "infinite weight": random,
        "weight 0": random,
    }
    finite = {name: row.clamp(-limits.max, limits.max) if row.isfinite().all() else row for name, row in rows.items()}
    return {name: row.to(dtype) for name, row in finite.items()}


def make_inputs(shape: Shape, dtype: torch.dtype, repeats: int, device: str) -> Inputs:
    """All rows of `make_gates`, then `repeats` times as many plain ones."""
    generator = torch.Generator().manual_seed(shape.neurons)
    rows = make_gates(shape.neurons, dtype, generator)
    plain = repeats * len(rows)
    names = [*rows, *["normal"] * plain]
    gate_NH = torch.stack([*rows.values(), *torch.randn(plain, shape.neurons, generator=generator).to(dtype)])
    up_NH, dhidden_NH = torch.randn(2, *gate_NH.shape, generator=generator).to(dtype)
    probs_N = torch.rand(len(names), generator=generator)
    for name, weight in (("NaN as weight", math.nan), ("infinite weight", math.inf), ("weight 0", 0.0)):
        probs_N[names.index(name)] = weight
    gate_NH, up_NH, dhidden_NH, probs_N = (tensor.to(device) for tensor in (gate_NH, up_NH, dhidden_NH, probs_N))
    if shape.halves:
        gate_NH, up_NH = torch.cat([gate_NH, up_NH], dim=1).chunk(2, dim=1)
        dhidden_NH = torch.cat([dhidden_NH, dhidden_NH], dim=1)[:, : shape.neurons]
        probs_N = probs_N.to(dtype).repeat_interleave(2)[::2]
    return Inputs(names, gate_NH, up_NH, probs_N, dhidden_NH)


class Guarded(TorchDispatchMode):
    """Surrounds every new tensor with cells in which nothing may be written."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func not in (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default):
            return result
        self.cells.append(result.new_full((result.numel() + 2 * GUARD_CELLS,), GUARD))
        return self.cells[-1][GUARD_CELLS:-GUARD_CELLS].view(result.shape)

    def intact(self) -> bool:
        edges = [edge for cells in self.cells for edge in (cells[:GUARD_CELLS], cells[-GUARD_CELLS:])]
        return all(bool((edge == GUARD).all()) for edge in edges)


class Errors:
    """The largest error of each quantity as a share of what is allowed, and the row that has it."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.rows_with_other_choice = names, 0
        self.found: dict[str, dict[str, Any]] = {}

    def add(self, quantity: str, share_NX: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """share_NX: NaN is as bad as infinity. where: bool, false where it does not count."""
        if where is not None:
            share_NX = torch.where(where, share_NX, 0.0)
        share_N = share_NX.double().nan_to_num(nan=math.inf, posinf=math.inf).amax(1)
        worst = int(share_N.argmax())
        self.found[quantity] = {"share": float(share_N[worst]), "row": self.names[worst] if self.names else ""}

    def require(self, quantity: str, right_NX: torch.Tensor) -> None:
        """right_NX: bool, true where it is exactly as it should be."""
        self.add(quantity, torch.where(right_NX, 0.0, math.inf))

    def record(self, name: str) -> Record:
        """The check's record. What is infinite is written as text: JSON has no number for it."""
        quantity, worst = max(self.found.items(), key=lambda item: item[1]["share"])
        shares = {name: _number(error["share"]) for name, error in self.found.items()}
        passed = worst["share"] <= 1
        return {
            "name": name, "passed": passed, "worst": _number(worst["share"]), "quantity": quantity, "row": worst["row"],
            "shares": shares, "rows": len(self.names), "rows_with_other_choice": self.rows_with_other_choice,
        }  # fmt: skip


def _number(share: float) -> float | str:
    return float(f"{share:.3g}") if math.isfinite(share) else "infinite"


def share_of(ours: torch.Tensor, right: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """|ours - right| / allowed; 0 where both are the same infinity or NaN."""
    same = (ours == right) | (ours.isnan() & right.isnan())
    return torch.where(same, 0.0, (ours.double() - right.double()).abs() / allowed.double())


def compare(kernels: Any, inputs: Inputs, k: int, activation: str) -> Errors:
    """Errors of `kernels.select_and_gate` and `kernels.select_and_gate_backward`.

    They may keep other neurons than the reference does only where magnitudes are equal but for rounding.
    """
    names, gate_NH, up_NH, probs_N, dhidden_NH = inputs
    dtype, neurons = gate_NH.dtype, gate_NH.size(1)
    relative = RELATIVE[dtype]
    step = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    gate, up, probs = (tensor.detach().clone().requires_grad_() for tensor in (gate_NH, up_NH, probs_N))
    right = select_and_gate_reference(gate, up, probs, k, activation)
    rights = torch.autograd.grad(right.hidden_NH, [gate, up, probs], dhidden_NH)
    right_hidden_NH, right_mask_NH = right.hidden_NH.detach(), unpack(right.masks_NW, neurons)

    errors = Errors(names)
    with Guarded() as guard:
        hidden_NH, masks_NW, gates_NK, ups_NK, threshold_N = kernels.select_and_gate(gate_NH, up_NH, probs_N, k, activation)
    mask_NH = unpack(masks_NW, neurons)
    errors.require("as many kept", (mask_NH.sum(1, keepdim=True) == k) & (pack(mask_NH) == masks_NW))
    if errors.found["as many kept"]["share"] > 0:
        return errors  # nothing else has the right shape

    right_N1 = right.threshold_N[:, None]
    active_NH, slack_N1 = compare_choice(errors, gate_NH, mask_NH, right_mask_NH, right_N1, activation)
    same_N1 = (mask_NH == right_mask_NH).all(1, keepdim=True)

    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for name, kept_NK, all_NH in (("gates", gates_NK, gate_NH), ("ups", ups_NK, up_NH)):
        errors.require(name, kept_NK.contiguous().view(bits) == all_NH[mask_NH].view(-1, k).view(bits))
    hidden_allowed_NH = relative * right_hidden_NH.double().abs() + (ABSOLUTE if activation == "gelu" else TINY + step)
    # In the reference a weight that is NaN makes NaN of dropped neurons, and torch's GELU of infinity is NaN on a CPU.
    compared_NH = same_N1 & mask_NH & ~gate_NH.isinf()
    errors.add("hidden", share_of(hidden_NH, right_hidden_NH, hidden_allowed_NH), compared_NH)
    errors.add("threshold", share_of(threshold_N[:, None], right_N1, 1e-5 * right_N1 + TINY + slack_N1))

    with Guarded() as guard_backward:
        dgate_NH, dup_NH, dprobs_N = kernels.select_and_gate_backward(
            dhidden_NH, masks_NW, gates_NK, ups_NK, probs_N, activation
        )
    for name, gradient_NH, right_NH in (("dgate", dgate_NH, rights[0]), ("dup", dup_NH, rights[1])):
        allowed_NH = relative * right_NH.double().abs() + ABSOLUTE
        defined_NH = same_N1 & right_NH.isfinite() & gate_NH.isfinite() & probs_N.isfinite()[:, None]
        errors.add(name, share_of(gradient_NH, right_NH, allowed_NH), defined_NH)
    # A sum over the row, in another order.
    terms_N = (dhidden_NH.double() * active_NH.double() * up_NH.double() * mask_NH).abs().sum(1)
    allowed_N = relative * rights[2].double().abs() + 2e-6 * terms_N + ABSOLUTE
    finite_N1 = (rights[2].isfinite() & terms_N.isfinite())[:, None]
    errors.add("dprobs", share_of(dprobs_N[:, None], rights[2][:, None], allowed_N[:, None]), same_N1 & finite_N1)
    for name, result_NH in (("hidden", hidden_NH), ("dgate", dgate_NH), ("dup", dup_NH)):
        errors.require(f"{name} of dropped neurons", mask_NH | (result_NH == 0))
    intact = guard.intact() and guard_backward.intact()
    errors.require("inside its results", torch.full((len(names), 1), intact))
    return errors


def compare_choice(
    errors: Errors,
    gate_NH: torch.Tensor,
    mask_NH: torch.Tensor,
    right_mask_NH: torch.Tensor,
    border_N1: torch.Tensor,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add errors of a choice of neurons. Returns act(gate) [N, H], and how far from the border it may differ, [N, 1].

    border_N1: the smallest magnitude that is kept.
    """
    active_NH = ACTIVATIONS[activation].function(gate_NH.float().clamp_min(torch.finfo(torch.float32).min))
    exact = activation in ("relu", "relu_squared")
    slack_N1 = 0 * border_N1 if exact else (1e-6 if activation == "gelu" else TINY) + 1e-5 * border_N1
    differ_NH = mask_NH != right_mask_NH
    errors.add("which kept", torch.where(differ_NH, (scores_of(active_NH) - border_N1).abs() / slack_N1, 0.0))
    errors.require("ties", _ties_right(gate_NH, mask_NH, right_mask_NH))
    errors.rows_with_other_choice = int(differ_NH.any(1).sum())
    return active_NH, slack_N1


def _ties_right(gate_NH: torch.Tensor, mask_NH: torch.Tensor, right_mask_NH: torch.Tensor) -> torch.Tensor:
    """[N, 1] whether no neuron was kept in place of one with the very same gate."""
    right_N1 = torch.ones(len(gate_NH), 1, dtype=torch.bool, device=gate_NH.device)
    for row in (mask_NH != right_mask_NH).any(1).nonzero().flatten().tolist():
        kept, missed = mask_NH[row] & ~right_mask_NH[row], right_mask_NH[row] & ~mask_NH[row]
        right_N1[row] = not torch.isin(gate_NH[row][kept].float(), gate_NH[row][missed].float()).any()
    return right_N1


def check_limits(kernels: Any, activation: str, device: str) -> Errors:
    """Activations and slopes where exponentials leave the range of fp32, and at both infinities."""
    gate_1H = torch.tensor([[*EXTREMES, -math.inf, math.inf]], device=device, requires_grad=True)
    ones_1H, one = torch.ones_like(gate_1H), torch.ones(1, device=device)
    active_1H, *kept, _ = kernels.select_and_gate(gate_1H.detach(), ones_1H, one, gate_1H.size(1), activation)
    slope_1H, *_ = kernels.select_and_gate_backward(ones_1H, *kept, one, activation)
    right_1H = ACTIVATIONS[activation].function(gate_1H)
    (right_slope_1H,) = torch.autograd.grad(right_1H.sum(), gate_1H)
    errors = Errors([activation])
    for name, ours, right in (("activation", active_1H, right_1H.detach()), ("slope", slope_1H, right_slope_1H)):
        errors.add(name, share_of(ours, right, 1e-5 * right.abs() + 1e-36)[:, :-2])
    last = {"silu": 1.0, "gelu": 1.0, "relu": 1.0, "sigmoid": 0.0, "relu_squared": math.inf}[activation]
    highest = 1.0 if activation == "sigmoid" else math.inf
    errors.require("at infinity", active_1H[:, -2:] == torch.tensor([0.0, highest], device=device))
    errors.require("slope at infinity", slope_1H[:, -2:] == torch.tensor([0.0, last], device=device))
    return errors


def check_sizes(kernels: Any, dtype: torch.dtype, activation: str, device: str) -> Errors:
    """One row and none: results have the right shapes, and are right."""
    shape = Shape(40, (7,))
    names, *tensors = make_inputs(shape, dtype, 1, device)
    one, none = (Inputs(names[-rows:] if rows else [], *(t[len(names) - rows :] for t in tensors)) for rows in (1, 0))
    errors = compare(kernels, one, 7, activation)
    _, gate_NH, up_NH, probs_N, dhidden_NH = none
    results = kernels.select_and_gate(gate_NH, up_NH, probs_N, 7, activation)
    gradients = kernels.select_and_gate_backward(dhidden_NH, *results[1:4], probs_N, activation)
    shapes = [tuple(tensor.shape) for tensor in (*results, *gradients)]
    right = [(0, 40), (0, 3), (0, 7), (0, 7), (0,), (0, 40), (0, 40), (0,)]
    errors.require("shapes without rows", torch.tensor([[shapes == right]]))
    return errors


def check_selection(
    dtype: str, activation: str, shapes: tuple[Shape, ...], repeats: int, device: str, kernels: Any = None
) -> Iterator[Record]:
    """A record for each shape and K; kernels: what takes the place of the Triton kernels."""
    if kernels is None:
        from mone_model.kernels.triton import selection as kernels
    for shape in shapes:
        inputs = make_inputs(shape, DTYPES[dtype], repeats, device)
        for k in shape.ks:
            name = f"{activation} {dtype} H={shape.neurons} K={k}{' halves' if shape.halves else ''}"
            yield recorded(name, functools.partial(compare, kernels, inputs, k, activation))


def check_edges(dtype: str, activation: str, device: str, kernels: Any = None) -> Iterator[Record]:
    """The limits of an activation, one row, and no rows."""
    if kernels is None:
        from mone_model.kernels.triton import selection as kernels
    yield recorded(f"{activation} limits", lambda: check_limits(kernels, activation, device))
    yield recorded(f"{activation} {dtype} few rows", lambda: check_sizes(kernels, DTYPES[dtype], activation, device))


def recorded(name: str, check: Callable[[], Errors]) -> Record:
    """The record of a check; one that raises has failed, and the others go on."""
    try:
        return check().record(name)
    except Exception:  # a compiler's or a driver's, too
        return {"name": name, "passed": False, "error": traceback.format_exc(limit=-4)}
