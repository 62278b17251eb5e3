"""The Triton kernels of selection: numerics in Triton's interpreter, and compilation."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.gpu.checks import EXTREMES
from mone_model.activations import ACTIVATIONS
from mone_model.neuron_selection import select_and_gate_reference, unpack
from tests.interpreted import Interpreter, interpreting

# Earlier interpreters fail with numpy 2.4; earlier compilers do not.
pytest.importorskip("triton", minversion="3.7")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter truncates fp32 to bf16, and a GPU rounds: the last bit can differ.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """interpreter(name, *arguments) calls a function of mone_model.kernels.triton.selection."""
    with interpreting("mone_model.kernels.triton.selection") as call:
        yield lambda name, *arguments: call(name, *arguments, guarded=0 if name == "selects" else 3)


def unambiguous(gate_NH: torch.Tensor, k: int, activation: str) -> bool:
    """Whether the choice of neurons survives errors in the last bits of the activation."""
    if activation in ("relu", "relu_squared"):
        return True  # exact
    score_NH = ACTIVATIONS[activation].function(gate_NH.float()).abs()
    threshold_N1, index_N1 = (found[:, -1:] for found in score_NH.topk(k))
    close_NH = (score_NH - threshold_N1).abs() <= 1e-6 + 1e-5 * threshold_N1
    return bool((gate_NH == gate_NH.gather(1, index_N1))[close_NH].all())


def check(
    interpreter: Interpreter, gate_NH: torch.Tensor, up_NH: torch.Tensor, probs_N: torch.Tensor, k: int, activation: str
) -> None:
    """Forward and backward against the reference and autograd."""
    dtype = gate_NH.dtype
    gate_leaf, up_leaf, probs_leaf = (tensor.clone().requires_grad_() for tensor in (gate_NH, up_NH, probs_N))
    reference = select_and_gate_reference(gate_leaf, up_leaf, probs_leaf, k, activation)
    hidden_NH, masks_NW, gates_NK, ups_NK, threshold_N = interpreter(
        "select_and_gate", gate_NH, up_NH, probs_N, k, activation
    )
    assert torch.equal(masks_NW, reference.masks_NW)
    mask_NH = unpack(masks_NW, gate_NH.size(1))
    assert torch.equal(gates_NK.flatten(), gate_NH[mask_NH])
    assert torch.equal(ups_NK.flatten(), up_NH[mask_NH])
    assert hidden_NH.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(hidden_NH, reference.hidden_NH, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(threshold_N, reference.threshold_N, rtol=2e-6, atol=1e-6)

    dhidden_NH = torch.randn(gate_NH.shape, generator=torch.Generator().manual_seed(k)).to(dtype)
    reference.hidden_NH.backward(dhidden_NH)
    dgate_NH, dup_NH, dprobs_N = interpreter(
        "select_and_gate_backward", dhidden_NH, masks_NW, gates_NK, ups_NK, probs_N, activation
    )
    for gradient_NH, leaf in ((dgate_NH, gate_leaf), (dup_NH, up_leaf)):
        assert not gradient_NH[~mask_NH].any()
        torch.testing.assert_close(gradient_NH, leaf.grad, rtol=tolerance, atol=1e-5)
    # A sum over the row, in another order.
    torch.testing.assert_close(dprobs_N, probs_leaf.grad, rtol=tolerance, atol=1e-5 * gate_NH.size(1) ** 0.5)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3),
    neurons=st.integers(1, 300),
    kept=st.floats(0, 1),
    values=st.sampled_from([3, 12, 1000]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_equals_its_reference(
    interpreter: Interpreter,
    seed: int,
    rows: int,
    neurons: int,
    kept: float,
    values: int,
    dtype: torch.dtype,
    activation: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(kept * neurons))
    # Few distinct values, so that there are many ties. Halves of a tensor have rows with gaps in memory.
    grid_NG = torch.randint(-values, values + 1, (rows, 2 * neurons), generator=generator) * (4 / values)
    gate_NH, up_NH = grid_NG.to(dtype).chunk(2, dim=1)
    assume(unambiguous(gate_NH, k, activation))
    check(interpreter, gate_NH, up_NH, torch.rand(rows, generator=generator), k, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales(interpreter: Interpreter, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scales_N1 = torch.tensor([1e-30, 1e-4, 1.0, 300.0, 1.0, 1.0])[:, None]
    gate_NH = scales_N1 * torch.randn(6, 200, generator=generator)
    gate_NH[4] *= torch.randn(200, generator=generator).mul(4).exp()
    gate_NH[5, ::50] *= 2**14
    gate_NH, up_NH = gate_NH.clamp(-60000, 60000).to(dtype), torch.randn(6, 200, generator=generator).to(dtype)
    for k in (1, 7, 100, 199, 200):
        _, masks_NW, _, _, threshold_N = interpreter("select_and_gate", gate_NH, up_NH, torch.ones(6), k, "relu")
        reference = select_and_gate_reference(gate_NH, up_NH, torch.ones(6), k, "relu")
        assert torch.equal(masks_NW, reference.masks_NW)
        assert torch.equal(threshold_N, reference.threshold_N)


def test_weights_in_the_dtype_of_the_activations(interpreter: Interpreter) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_NH, up_NH = torch.randn(2, 96, generator=generator).half().chunk(2, dim=1)
    check(interpreter, gate_NH, up_NH, torch.rand(4, generator=generator)[::2].half(), 20, "silu")


def test_the_longest_rows(interpreter: Interpreter) -> None:
    generator = torch.Generator().manual_seed(0)
    gate_NH, up_NH = torch.randn(2, 2, 16384, generator=generator)
    assert unambiguous(gate_NH, 5000, "silu")
    check(interpreter, gate_NH, up_NH, torch.rand(2, generator=generator), 5000, "silu")


def test_no_rows(interpreter: Interpreter) -> None:
    none_NH, none_N = torch.empty(0, 40), torch.empty(0)
    hidden_NH, masks_NW, gates_NK, ups_NK, threshold_N = interpreter("select_and_gate", none_NH, none_NH, none_N, 7, "silu")
    assert [tuple(tensor.shape) for tensor in (hidden_NH, masks_NW, gates_NK, ups_NK, threshold_N)] == [
        (0, 40), (0, 3), (0, 7), (0, 7), (0,)
    ]  # fmt: skip
    gradients = interpreter("select_and_gate_backward", none_NH, masks_NW, gates_NK, ups_NK, none_N, "silu")
    assert [tuple(tensor.shape) for tensor in gradients] == [(0, 40), (0, 40), (0,)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeps_exactly_k_and_stays_in_bounds_for_any_row(interpreter: Interpreter, dtype: torch.dtype) -> None:
    nan, infinity = float("nan"), float("inf")
    rows = [[nan], [nan, 1.0, -nan, 2.0, 0.5], [infinity, -infinity, 1.0], [0.0], [-nan, infinity], [3.0, 2.0, 1.0]]
    gate_NH = torch.tensor([(row * 37)[:37] for row in rows], dtype=dtype)
    up_NH = torch.ones_like(gate_NH)
    for k in (1, 5, 20, 36, 37):
        _, masks_NW, gates_NK, ups_NK, threshold_N = interpreter("select_and_gate", gate_NH, up_NH, torch.ones(6), k, "silu")
        mask_NH = unpack(masks_NW, 37)
        assert mask_NH.sum(1).tolist() == [k] * 6
        torch.testing.assert_close(gates_NK.flatten(), gate_NH[mask_NH], rtol=0, atol=0, equal_nan=True)
        reference = select_and_gate_reference(gate_NH, up_NH, torch.ones(6), k)
        assert torch.equal(masks_NW, reference.masks_NW)
        torch.testing.assert_close(threshold_N, reference.threshold_N, rtol=2e-6, atol=0)
        dgate_NH, dup_NH, _ = interpreter(
            "select_and_gate_backward", gate_NH, masks_NW, gates_NK, ups_NK, torch.full((6,), nan), "silu"
        )
        assert not dgate_NH[~mask_NH].any()
        assert not dup_NH[~mask_NH].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_their_gradients_reach_their_limits(interpreter: Interpreter, activation: str) -> None:
    gate_1H = torch.tensor([[*EXTREMES, -float("inf"), float("inf")]], requires_grad=True)
    ones_1H, one = torch.ones_like(gate_1H), torch.ones(1)
    neurons = gate_1H.size(1)
    active_1H, *kept, _ = interpreter("select_and_gate", gate_1H.detach(), ones_1H, one, neurons, activation)
    slope_1H, *_ = interpreter("select_and_gate_backward", ones_1H, *kept, one, activation)
    expected_1H = ACTIVATIONS[activation].function(gate_1H)
    (expected_slope_1H,) = torch.autograd.grad(expected_1H.sum(), gate_1H)
    for ours, right in ((active_1H, expected_1H), (slope_1H, expected_slope_1H)):
        torch.testing.assert_close(ours[:, :-2], right[:, :-2], rtol=1e-6, atol=1e-36)
    assert active_1H[0, -2:].tolist() == [0.0, 1.0 if activation == "sigmoid" else float("inf")]
    if activation != "relu_squared":
        assert slope_1H[0, -2:].tolist() == [0.0, 0.0 if activation == "sigmoid" else 1.0]


def test_availability_of_the_kernel(interpreter: Interpreter) -> None:
    from mone_model.kernels.triton import selection as triton

    assert not triton.selects(torch.empty(1, 8))  # neither a GPU nor the interpreter
    assert all(interpreter("selects", torch.empty(1, 16384, dtype=dtype)) for dtype in DTYPES)
    assert not interpreter("selects", torch.empty(1, 16385))
    assert not interpreter("selects", torch.empty(1, 8, dtype=torch.float64))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_compiles_for_gpus_without_spilling_rows(kernel: str, capability: int) -> None:
    from benchmarks.triton_resources import NEURONS, resources

    for dtype in (torch.float32, torch.bfloat16):
        for neurons in NEURONS if capability < 100 else NEURONS[-1:]:  # the longest rows need most registers
            launches = list(resources(kernel, dtype, neurons, capability))
            assert launches
            # Some versions of ptxas spill two registers, 8 bytes, to fit one more program.
            assert [launch for launch in launches if launch.stack > 16] == []
