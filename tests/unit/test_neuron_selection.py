import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.gpu.checks import EXTREMES
from mone_model.activations import ACTIVATIONS
from mone_model.kernels.cpu import library as cpu_library
from mone_model.kernels.cpu import selection as cpu
from mone_model.neuron_selection import (
    pack,
    select_and_gate,
    select_and_gate_reference,
    select_neurons,
    select_neurons_reference,
    unpack,
)

# Few distinct values, so that there are many ties.
TIED_ROWS = st.integers(1, 40).flatmap(
    lambda neurons: st.lists(
        st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, 3.0]), min_size=neurons, max_size=neurons),
        min_size=1,
        max_size=5,
    )
)


@settings(deadline=None, max_examples=200)
@given(rows=TIED_ROWS, data=st.data())
def test_keeps_exactly_k_and_breaks_ties_by_index(rows: list[list[float]], data: st.DataObject) -> None:
    gate_NH = torch.tensor(rows)
    k = data.draw(st.integers(1, gate_NH.size(1)))
    kept = select_neurons(gate_NH, k)
    assert kept.mask_NH.sum(-1).tolist() == [k] * len(rows)
    for row, mask, threshold in zip(rows, kept.mask_NH.tolist(), kept.threshold_N.tolist(), strict=True):
        by_score = sorted(range(len(row)), key=lambda j: (-abs(row[j]), j))
        assert {j for j, keep in enumerate(mask) if keep} == set(by_score[:k])
        assert threshold == abs(row[by_score[k - 1]])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), neurons=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_equals_its_reference(seed: int, neurons: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate_NH = torch.randn(7, neurons, generator=generator).to(dtype)
    k = int(torch.randint(1, neurons + 1, (), generator=generator))
    fast, reference = select_neurons(gate_NH, k), select_neurons_reference(gate_NH, k)
    assert torch.equal(fast.mask_NH, reference.mask_NH)
    assert torch.equal(fast.threshold_N, reference.threshold_N)


def test_the_score_is_taken_after_the_activation() -> None:
    before = torch.tensor([[-8.0, 0.5]])
    assert select_neurons(torch.nn.functional.silu(before), 1).mask_NH.tolist() == [[False, True]]


def test_no_rows() -> None:
    kept = select_neurons(torch.empty(0, 8), 3)
    assert kept.mask_NH.shape == (0, 8)
    assert kept.threshold_N.shape == (0,)


@pytest.mark.parametrize("k", [0, 9])
def test_refuses_impossible_k(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}"):
        select_neurons(torch.zeros(1, 8), k)


EXACT = ("relu", "relu_squared")
"""Activations with identical rounding in all implementations. Others can differ in the last bit."""


def unambiguous(gate_NH: torch.Tensor, k: int, activation: str) -> bool:
    """Whether the choice of neurons survives errors in the last bits of the activation."""
    if activation in EXACT or k == gate_NH.size(1):
        return True
    best_NK = ACTIVATIONS[activation].function(gate_NH.float()).abs().topk(k + 1).values
    return bool((best_NK[:, k - 1] - best_NK[:, k] > 1e-6 + 1e-5 * best_NK[:, k]).all())


def assert_gated_as_the_reference(
    gate_NH: torch.Tensor, up_NH: torch.Tensor, probs_N: torch.Tensor, k: int, activation: str
) -> None:
    gate_leaf, up_leaf, probs_leaf = (tensor.clone().requires_grad_() for tensor in (gate_NH, up_NH, probs_N))
    expected = select_and_gate_reference(gate_leaf, up_leaf, probs_leaf, k, activation)
    gate_NH, up_NH, probs_N = (tensor.detach().requires_grad_() for tensor in (gate_NH, up_NH, probs_N))
    gated = select_and_gate(gate_NH, up_NH, probs_N, k, activation)
    assert torch.equal(gated.masks_NW, expected.masks_NW)
    target_NH = torch.randn(gate_NH.shape, generator=torch.Generator().manual_seed(k)).to(gate_NH.dtype)
    gradients = torch.autograd.grad(gated.hidden_NH, [gate_NH, up_NH, probs_N], target_NH)
    right = torch.autograd.grad(expected.hidden_NH, [gate_leaf, up_leaf, probs_leaf], target_NH)
    # bf16: torch's operations round once more.
    relative = 2e-6 if gate_NH.dtype == torch.float32 else 2**-7
    for ours, theirs in zip((gated.hidden_NH, gated.threshold_N, *gradients), (*expected[::2], *right), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=relative, atol=2e-6 * gate_NH.size(1) ** 0.5)


@pytest.mark.parametrize("kernels", [True, False])
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    neurons=st.integers(1, 600),
    kept=st.floats(0, 1),
    values=st.sampled_from([1, 3, 100]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_gating_equals_its_reference(
    kernels: bool, seed: int, neurons: int, kept: float, values: int, dtype: torch.dtype, activation: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(kept * neurons))
    gates_and_ups = torch.randn(5, 2 * neurons, generator=generator)
    if activation in EXACT:  # few distinct values: many ties
        gates_and_ups = (gates_and_ups * values).round() / values
    # Halves of a tensor have rows with gaps in memory.
    gate_NH, up_NH = gates_and_ups.to(dtype).chunk(2, dim=1)
    assume(unambiguous(gate_NH, k, activation))
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(cpu_library, "allowed", False)
        assert cpu.selects(gate_NH) == kernels
        assert_gated_as_the_reference(gate_NH, up_NH, torch.rand(5, generator=generator), k, activation)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 300.0])
def test_gating_finds_thresholds_of_any_scale(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_NH = scale * torch.randn(6, 1000, generator=generator)
    gate_NH[1] *= torch.randn(1000, generator=generator).mul(4).exp()
    gate_NH[2, ::50] *= 2**14
    for k in (1, 7, 500, 999, 1000):
        gated = select_and_gate(gate_NH, torch.ones(6, 1000), torch.ones(6), k, "relu")
        expected = select_and_gate_reference(gate_NH, torch.ones(6, 1000), torch.ones(6), k, "relu")
        for ours, theirs in zip(gated, expected, strict=True):
            assert torch.equal(ours, theirs)


NAN, INFINITY = float("nan"), float("inf")
LAST_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()  # the NaN with the largest bit pattern
# All NaN, some, fewer or more than are kept, and infinities among them.
BROKEN_ROWS = st.tuples(
    st.integers(1, 40),
    st.sampled_from([[NAN, LAST_NAN], [NAN, -INFINITY, INFINITY], [NAN, -NAN, INFINITY, -INFINITY, 0.0, -1.0, 2.0, 1e38]]),
).flatmap(
    lambda case: st.lists(
        st.lists(st.sampled_from(case[1]), min_size=case[0], max_size=case[0]),
        min_size=1,
        max_size=4,
    )
)


def best_of(scores: list[float], k: int) -> set[int]:
    """The k largest, NaN as infinity, the lower index first among equals."""
    ranked = [INFINITY if math.isnan(score) else abs(score) for score in scores]
    return set(sorted(range(len(ranked)), key=lambda j: (-ranked[j], j))[:k])


@settings(deadline=None, max_examples=60)
@given(rows=BROKEN_ROWS, data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_selection_keeps_exactly_k_for_any_row(rows: list[list[float]], data: st.DataObject, dtype: torch.dtype) -> None:
    gate_NH = torch.tensor(rows).to(dtype)
    k = data.draw(st.integers(1, gate_NH.size(1)))
    for select in (select_neurons, select_neurons_reference):
        kept = select(gate_NH, k)
        assert [set(row.nonzero()[:, 0].tolist()) for row in kept.mask_NH] == [best_of(row, k) for row in rows]
        assert not kept.threshold_N.isnan().any()


@pytest.mark.parametrize("kernels", [True, False])
@settings(deadline=None, max_examples=60)
@given(
    rows=BROKEN_ROWS,
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_gating_keeps_exactly_k_for_any_row(
    kernels: bool, rows: list[list[float]], data: st.DataObject, dtype: torch.dtype, activation: str
) -> None:
    gate_NH = torch.tensor(rows).to(dtype).requires_grad_()
    k = data.draw(st.integers(1, gate_NH.size(1)))
    ones_NH = torch.ones_like(gate_NH, requires_grad=True)
    expected = select_and_gate_reference(gate_NH, ones_NH, torch.ones(len(rows)), k, activation)
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(cpu_library, "allowed", False)
        gated = select_and_gate(gate_NH, ones_NH, torch.ones(len(rows)), k, activation)
        gradients = torch.autograd.grad(gated.hidden_NH, [gate_NH, ones_NH], torch.ones_like(gate_NH))
    mask_NH = unpack(gated.masks_NW, gate_NH.size(1))
    assert mask_NH.sum(1).tolist() == [k] * len(rows)
    assert torch.equal(gated.masks_NW, expected.masks_NW)
    torch.testing.assert_close(gated.threshold_N, expected.threshold_N)
    assert torch.equal(gated.hidden_NH.isfinite(), expected.hidden_NH.isfinite())
    for tensor in (gated.hidden_NH, *gradients):
        assert not tensor[~mask_NH].any()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_gradients_reach_their_limits(
    kernels: bool, dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernels:
        monkeypatch.setattr(cpu_library, "allowed", False)
    ones_1H = torch.ones(1, len(EXTREMES), dtype=dtype)
    gate_1H = torch.tensor([EXTREMES]).to(dtype).requires_grad_()
    active_1H = select_and_gate(gate_1H, ones_1H, torch.ones(1), len(EXTREMES), activation).hidden_NH
    (slope_1H,) = torch.autograd.grad(active_1H, gate_1H, ones_1H)
    exact_1H = gate_1H.detach().float().requires_grad_()
    expected_1H = ACTIVATIONS[activation].function(exact_1H)
    (expected_slope_1H,) = torch.autograd.grad(expected_1H.sum(), exact_1H)
    for ours, right in ((active_1H, expected_1H), (slope_1H, expected_slope_1H)):
        torch.testing.assert_close(ours, right.to(dtype), rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-36)
    limits_1H = torch.tensor([[-INFINITY, INFINITY]], dtype=dtype, requires_grad=True)
    active_1H = select_and_gate(limits_1H, torch.ones_like(limits_1H), torch.ones(1), 2, activation).hidden_NH
    (slope_1H,) = torch.autograd.grad(active_1H, limits_1H, torch.ones_like(limits_1H))
    assert active_1H[0, 0] == 0
    if kernels or activation != "gelu":  # torch's GELU of infinity is NaN, which ranks the same
        assert active_1H[0, 1] == (1.0 if activation == "sigmoid" else INFINITY)
    if activation != "relu_squared":
        assert slope_1H.tolist() == [[0.0, 0.0 if activation == "sigmoid" else 1.0]]


def test_gating_is_a_proper_operator_of_torch() -> None:
    gate_NH, up_NH, probs_N = (torch.randn(shape, requires_grad=True) for shape in ((4, 40), (4, 40), (4,)))
    torch.library.opcheck(torch.ops.mone.select_and_gate.default, (gate_NH, up_NH, probs_N, 10, "silu"))
    none = select_and_gate(torch.empty(0, 40), torch.empty(0, 40), torch.empty(0), 10)
    assert [tuple(tensor.shape) for tensor in none] == [(0, 40), (0, 3), (0,)]
    with pytest.raises(ValueError, match="k=41"):
        select_and_gate(gate_NH, up_NH, probs_N, 41)


def test_gating_compiles_in_one_piece() -> None:
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((4, 40), (4, 40), (4,))]

    def gate_and_square(gate_NH: torch.Tensor, up_NH: torch.Tensor, probs_N: torch.Tensor) -> torch.Tensor:
        return select_and_gate(gate_NH, up_NH, probs_N, 10).hidden_NH.square()

    compiled = torch.compile(gate_and_square, backend="aot_eager", fullgraph=True)
    ours, right = compiled(*inputs).sum(), gate_and_square(*inputs).sum()
    assert torch.equal(ours, right)
    for gradient, expected in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(right, inputs), strict=True):
        assert torch.equal(gradient, expected)


@given(st.lists(st.lists(st.booleans(), min_size=37, max_size=37), min_size=1, max_size=4))
def test_masks_are_packed_and_unpacked(rows: list[list[bool]]) -> None:
    mask_NH = torch.tensor(rows)
    assert torch.equal(unpack(pack(mask_NH), 37), mask_NH)


def test_without_a_compiler_torch_is_used_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(cpu_library, "_library", fail)
    cpu_library._compiles.cache_clear()
    try:
        assert not cpu_library.available()
        assert not cpu_library.available()
    finally:
        cpu_library._compiles.cache_clear()
    assert caplog.messages == [
        "CPU kernels: not built (no compiler); using slower operations of torch. Install a C++ compiler (g++)."
    ]
