"""The Triton kernels for a few rows: numerics in Triton's interpreter, what they read, and compilation."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from benchmarks.gpu.traffic import bound, count_traffic
from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import BACKENDS, Request, Rule, Weights
from mone_model.neuron_selection import TopK, scores_of, select_neurons_reference
from mone_model.thresholds import AtLeast
from tests.interpreted import Interpreter, interpreting

# Earlier interpreters fail with numpy 2.4.
pytest.importorskip("triton", minversion="3.7")

from mone_model.kernels.triton import decode
from mone_model.kernels.triton.decode import Kept

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter truncates fp32 to bf16, and a GPU rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    """interpreter(name, *arguments) calls a function of mone_model.kernels.triton.decode."""
    with interpreting("mone_model.kernels.triton.decode") as call:
        yield call


def activate(gate_NH: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) in fp32, with the limit at minus infinity."""
    return ACTIVATIONS[activation].function(gate_NH.float().clamp_min(torch.finfo(torch.float32).min))


def reference_mask(active_NH: torch.Tensor, rule: Rule) -> torch.Tensor:
    if isinstance(rule, AtLeast):
        return scores_of(active_NH) >= rule.threshold
    return select_neurons_reference(active_NH, rule.k).mask_NH


def arguments_of(rule: Rule) -> dict[str, Any]:
    """The rule as `select_rows` takes it."""
    return {"k": rule.k} if isinstance(rule, TopK) else {"k": 0, "threshold": rule.threshold}


def mask_of(kept: Kept, neurons: int) -> torch.Tensor:
    """[N, H] bool; checks that the lists are ascending."""
    mask_NH = torch.zeros(len(kept.counts_N), neurons, dtype=torch.bool)
    for row, count in enumerate(kept.counts_N.tolist()):
        ids = kept.ids_NS[row, :count].long()
        assert (ids.diff() > 0).all()
        mask_NH[row, ids] = True
    return mask_NH


def unambiguous(active_NH: torch.Tensor, gate_NH: torch.Tensor, mask_NH: torch.Tensor) -> bool:
    """Whether the choice survives errors in the last bits of the activation: what is close to the border is equal to it."""
    score_NH = active_NH.abs()
    border_N1 = score_NH.masked_fill(~mask_NH, torch.inf).amin(1, keepdim=True)
    at_border_N1 = gate_NH.gather(1, score_NH.masked_fill(~mask_NH, torch.inf).argmin(1, keepdim=True))
    close_NH = (score_NH - border_N1).abs() <= 1e-6 + 1e-5 * border_N1
    return bool((gate_NH == at_border_N1)[close_NH].all())


def check_lists(interpreter: Interpreter, gate_NH: torch.Tensor, probs_N: torch.Tensor, rule: Rule, activation: str) -> Kept:
    """Lists against the reference."""
    experts_N = torch.arange(len(gate_NH), dtype=torch.int32)
    options = arguments_of(rule)
    kept = Kept(*interpreter("select_rows", gate_NH, probs_N, experts_N, activation=activation, guarded=4, **options))
    active_NH = activate(gate_NH, activation)
    mask_NH = reference_mask(active_NH, rule)
    assert torch.equal(mask_of(kept, gate_NH.size(1)), mask_NH)
    expected_NH = active_NH * probs_N.float()[:, None]
    values = torch.cat([row[:count] for row, count in zip(kept.values_NS, kept.counts_N.tolist(), strict=True)])
    torch.testing.assert_close(values, expected_NH[mask_NH], rtol=1e-5, atol=1e-6, equal_nan=True)
    return kept


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3),
    neurons=st.integers(1, 300),
    kept=st.floats(0, 1),
    by_threshold=st.booleans(),
    values=st.sampled_from([3, 12, 1000]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_lists_equal_the_reference(
    interpreter: Interpreter,
    seed: int,
    rows: int,
    neurons: int,
    kept: float,
    by_threshold: bool,
    values: int,
    dtype: torch.dtype,
    activation: str,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that there are many ties. Halves of a tensor have rows with gaps in memory.
    grid_NG = torch.randint(-values, values + 1, (rows, 2 * neurons), generator=generator) * (4 / values)
    gate_NH = grid_NG.to(dtype).chunk(2, dim=1)[0]
    k = max(1, round(kept * neurons))
    active_NH = activate(gate_NH, activation)
    rule: Rule = TopK(k)
    if by_threshold:
        rule = AtLeast(float(active_NH.abs().flatten().topk(k).values[-1]))
        # A threshold between two magnitudes, or one that is exact.
        if activation not in ("relu", "relu_squared"):
            rule = AtLeast(rule.threshold - 2e-6 - 2e-5 * rule.threshold)
    mask_NH = reference_mask(active_NH, rule)
    exact = activation in ("relu", "relu_squared")
    if by_threshold:
        size_NH = active_NH.abs()
        assume(exact or not ((size_NH - rule.threshold).abs() <= 1e-6 + 1e-5 * size_NH).any())  # type: ignore[union-attr]
    else:
        assume(exact or unambiguous(active_NH, gate_NH, mask_NH))
    check_lists(interpreter, gate_NH, torch.rand(rows, generator=generator), rule, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_numbers_have_lists(interpreter: Interpreter, dtype: torch.dtype) -> None:
    nan, infinity = float("nan"), float("inf")
    rows = [[nan], [nan, 1.0, -nan, 2.0, 0.5], [infinity, -infinity, 1.0], [0.0, -0.0], [-nan, infinity], [3.0, 2.0, 1.0]]
    gate_NH = torch.tensor([(row * 37)[:37] for row in rows], dtype=dtype)
    rules: list[Rule] = [*map(TopK, (1, 5, 36, 37)), *map(AtLeast, (0.0, 1.5, infinity))]
    for rule in rules:
        check_lists(interpreter, gate_NH, torch.ones(6), rule, "silu")


def test_the_longest_rows(interpreter: Interpreter) -> None:
    gate_NH = torch.randn(2, 16384, generator=torch.Generator().manual_seed(0))
    active_NH = activate(gate_NH, "silu")
    for rule in (TopK(5000), AtLeast(0.3)):
        assert unambiguous(active_NH, gate_NH, reference_mask(active_NH, rule))
        check_lists(interpreter, gate_NH, torch.ones(2), rule, "silu")


def random_lists(rows: int, neurons: int, most: int, generator: torch.Generator) -> tuple[Kept, torch.Tensor]:
    """Lists of different lengths, 0 and `most` among them; the other slots hold what may not be read. And values [N, H]."""
    counts = [most, 0, *torch.randint(0, most + 1, (rows,), generator=generator).tolist()][:rows]
    ids_NS, values_NS = torch.full((rows, most), 2**30, dtype=torch.int32), torch.full((rows, most), torch.nan)
    dense_NH = torch.zeros(rows, neurons)
    for row, count in enumerate(counts):
        ids = torch.randperm(neurons, generator=generator)[:count].sort().values
        ids_NS[row, :count], values_NS[row, :count] = ids.int(), torch.randn(count, generator=generator)
        dense_NH[row, ids] = values_NS[row, :count]
    return Kept(ids_NS, values_NS, torch.tensor(counts, dtype=torch.int32)), dense_NH


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "topk", "experts", "width", "neurons", "most"),
    [
        (1, 1, 1, 16, 5, 5),
        (1, 4, 6, 48, 70, 33),
        (3, 2, 3, 40, 37, 17),
        (32, 2, 4, 24, 50, 20),
        (1, 2, 2, 528, 40, 24),  # more columns than a program reads together
        (1, 3, 2, 16, 1200, 1100),  # more neurons than PARTS programs read in one tile each
    ],
)
def test_up_and_down_of_lists(
    interpreter: Interpreter,
    tokens: int,
    topk: int,
    experts: int,
    width: int,
    neurons: int,
    most: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(tokens + neurons)
    rows = tokens * topk
    kept, values_NH = random_lists(rows, neurons, most, generator)
    x_TD = torch.randn(tokens, width, generator=generator).to(dtype)
    gate_up_E2HD = torch.randn(experts, 2, neurons, width, generator=generator).mul_(width**-0.5).to(dtype)
    gate_up_E2HD[:, 0] = torch.nan  # not to be read
    down_EHD = torch.randn(experts, neurons, width, generator=generator).mul_(neurons**-0.5).to(dtype)
    experts_N = torch.randint(experts, (rows,), generator=generator, dtype=torch.int32)
    out_TD = interpreter("up_down", x_TD, gate_up_E2HD, down_EHD, experts_N, kept, guarded=3)
    assert out_TD.dtype == dtype
    up_NHD, down_NHD = gate_up_E2HD[:, 1].double()[experts_N.long()], down_EHD.double()[experts_N.long()]
    hidden_NH = torch.einsum("nhd,nd->nh", up_NHD, x_TD.double().repeat_interleave(topk, 0)) * values_NH
    expected_TD = torch.einsum("nh,nhd->nd", hidden_NH, down_NHD).view(tokens, topk, width).sum(1)
    torch.testing.assert_close(out_TD.double(), expected_TD, rtol=TOLERANCE[dtype], atol=1e-5)


def test_rows_of_other_ranks_add_nothing(interpreter: Interpreter) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD, gate_NH = torch.randn(3, 32, generator=generator), torch.randn(6, 20, generator=generator)
    weights = torch.randn(2, 2, 20, 32, generator=generator), torch.randn(2, 20, 32, generator=generator)
    gate_NH[[1, 2, 3]] = torch.nan  # what a grouped GEMM leaves there may be anything
    experts_N = torch.tensor([0, -1, -1, -1, 1, 0], dtype=torch.int32)
    kept = interpreter("select_rows", gate_NH, torch.ones(6), experts_N, 7, "silu")
    assert kept.counts_N.tolist() == [7, 0, 0, 0, 7, 7]
    out_TD = interpreter("up_down", x_TD, *weights, experts_N, kept)
    assert not out_TD[1].any()
    alone_TD = interpreter("up_down", x_TD[:1], *weights, experts_N[:1], Kept(*(part[:1] for part in kept)))
    assert torch.equal(out_TD[:1], alone_TD)


def test_a_row_does_not_depend_on_the_others(interpreter: Interpreter) -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND, gate_NH = torch.randn(5, 48, generator=generator), torch.randn(5, 90, generator=generator)
    weights = torch.randn(2, 2, 90, 48, generator=generator), torch.randn(2, 90, 48, generator=generator)
    experts_N, probs_N = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32), torch.rand(5, generator=generator)

    def compute(rows: slice) -> torch.Tensor:
        kept = interpreter("select_rows", gate_NH[rows], probs_N[rows], experts_N[rows], 0, "gelu", threshold=0.4)
        return interpreter("up_down", x_ND[rows], *weights, experts_N[rows], kept)

    assert torch.equal(compute(slice(5)), torch.cat([compute(slice(row, row + 1)) for row in range(5)]))


def decoded(interpreter: Interpreter, arguments: tuple[Any, ...], rule: Rule, activation: str) -> torch.Tensor:
    options = arguments_of(rule)
    return interpreter("decode", *arguments, options.pop("k"), activation, **options).out_ND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rule", [TopK(18), TopK(72), AtLeast(0.2)])
def test_equals_the_loop_over_experts(interpreter: Interpreter, rule: Rule, activation: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_E = torch.tensor([2, 0, 3, 1, 0])
    x_ND = torch.randn(6, 48, generator=generator).to(dtype)
    weights = Weights(
        torch.randn(5, 2, 72, 48, generator=generator).mul_(48**-0.5).to(dtype),
        torch.randn(5, 72, 48, generator=generator).mul_(72**-0.5).to(dtype),
    )
    probs_N = torch.rand(6, generator=generator)
    expected_ND = BACKENDS["loop"].compute(weights, x_ND, tokens_E, probs_N, Request(rule, activation)).out_ND
    out_ND = decoded(interpreter, (x_ND, *weights, probs_N, tokens_E), rule, activation)
    # The loop rounds ups, products and outputs to the dtype; by thresholds it compares rounded activations.
    allowed = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out_ND, expected_ND, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("tokens", [[1], [0, 1], [64], [7, 0, 30, 27], [0, 0], [1] * 16])
def test_numbers_of_rows(interpreter: Interpreter, tokens: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, experts = sum(tokens), len(tokens)
    x_ND, probs_N = torch.randn(rows, 32, generator=generator), torch.rand(rows, generator=generator)
    gate_up_E2HD = torch.randn(experts, 2, 24, 32, generator=generator).mul_(32**-0.5)
    weights = Weights(gate_up_E2HD, torch.randn(experts, 24, 32, generator=generator).mul_(24**-0.5))
    out_ND = decoded(interpreter, (x_ND, *weights, probs_N, torch.tensor(tokens)), TopK(6), "silu")
    request = Request(TopK(6), "silu")
    expected_ND = BACKENDS["loop"].compute(weights, x_ND, torch.tensor(tokens), probs_N, request).out_ND
    torch.testing.assert_close(out_ND, expected_ND, rtol=1e-5, atol=1e-5)


def test_the_backend_uses_them_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    calls = []

    def record(*arguments: Any, **options: Any) -> decode.Decoded:
        calls.append((arguments, options))
        return decode.Decoded(arguments[0], Kept(*arguments[:3]))

    monkeypatch.setattr(decode, "decode", record)
    x_ND = torch.zeros(1, 4).as_subclass(OnGpu)
    weights = Weights(torch.zeros(1, 2, 8, 4), torch.zeros(1, 8, 4))
    for rule, expected in ((TopK(3), (3, None)), (AtLeast(0.5), (0, 0.5))):
        request = Request(rule, "relu")
        out_ND = BACKENDS["decode"].compute(weights, x_ND, torch.ones(1, dtype=torch.long), torch.ones(1), request).out_ND
        assert out_ND is x_ND
        arguments, options = calls.pop()
        assert (arguments[5], options["threshold"], arguments[6]) == (*expected, "relu")


def test_launches_do_not_depend_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a CUDA graph can capture them: tensors without data are enough, and nothing is read on the host."""
    launches: list[Any] = []
    monkeypatch.setattr(decode, "_launch", lambda kernel, grid, *_, **__: launches.append((kernel, grid)))
    with FakeTensorMode():
        x_TD, gate_NH, experts_N = torch.empty(4, 64), torch.empty(8, 160), torch.empty(8, dtype=torch.int32)
        for options in ({"k": 40}, {"k": 0, "threshold": 0.1}):
            kept = decode.select_rows(gate_NH, torch.empty(8), experts_N, activation="silu", **options)
            out_TD = decode.up_down(x_TD, torch.empty(3, 2, 160, 64), torch.empty(3, 160, 64), experts_N, kept)
            assert out_TD.shape == (4, 64)
        with pytest.raises(DataDependentOutputException):
            int(kept.counts_N.sum())  # this is what would be noticed
    kernels = (decode.select_kernel, decode.up_down_kernel, decode.sum_kernel)
    by_best, by_threshold = [(8,), (8, 3), (4, 1)], [(8,), (8, 10), (4, 1)]
    assert launches == [*zip(kernels, by_best, strict=True), *zip(kernels, by_threshold, strict=True)]


def test_where_the_kernels_can_be_used(interpreter: Interpreter) -> None:
    assert not decode.decodes(torch.empty(1, 8), 64)  # neither a GPU nor the interpreter
    assert all(interpreter("decodes", torch.empty(1, 8, dtype=dtype), 16384) for dtype in DTYPES)
    assert not interpreter("decodes", torch.empty(1, 8), 16385)
    assert not interpreter("decodes", torch.empty(1, 8, dtype=torch.float64), 64)


def count_bytes(arguments: tuple[Any, ...]) -> tuple[int, int, int]:
    """Bytes of weights that `up_down` loads in this process's interpreter, at distinct addresses, and of all else."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    weights, others = [], 0
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def touch(pointers: Any, mask: Any) -> None:
        nonlocal others
        size, touched = pointers.get_element_ty().primitive_bitwidth // 8, pointers.data[mask.data]
        if size == 2 and pointers.data.ndim == 2:
            weights.append(touched)
        elif pointers.data.size > 1:  # not what tells a program its part
            others += size * touched.size

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        touch(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
        decode.up_down(*arguments)
    addresses = np.concatenate(weights)
    return 2 * addresses.size, 2 * np.unique(addresses).size, others


@pytest.mark.parametrize(("width", "neurons", "most"), [(40, 90, 40), (528, 40, 24), (16, 1200, 1100)])
def test_it_moves_the_bytes_that_are_counted(width: int, neurons: int, most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    kept, _ = random_lists(6, neurons, most, generator)
    experts_N = torch.tensor([0, 0, 2, 2, 2, 0], dtype=torch.int32)
    x_ND = torch.randn(6, width).half()
    gate_up_E2HD, down_EHD = torch.randn(3, 2, neurons, width).half(), torch.randn(3, neurons, width).half()
    traffic = count_traffic(kept, experts_N, neurons=neurons, width=width, itemsize=2)
    with interpreting(__name__) as call:
        found = call("count_bytes", (x_ND, gate_up_E2HD, down_EHD, experts_N, kept))
    assert found == (traffic.requested, traffic.distinct, traffic.others)
    assert traffic.distinct < traffic.requested
    assert traffic.dense == 3 * traffic.gates == 3 * 2 * neurons * width * 2


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_random_lists_reach_the_bound(ratio: float, rows: int) -> None:
    neurons, experts = 2000, 20
    k = round(ratio * neurons)
    scores_NH = torch.rand(experts * rows, neurons, generator=torch.Generator().manual_seed(rows))
    ids_NS = scores_NH.topk(k).indices.sort().values.int()
    kept = Kept(ids_NS, torch.empty(ids_NS.shape), torch.full((experts * rows,), k, dtype=torch.int32))
    experts_N = torch.arange(experts).repeat_interleave(rows)
    traffic = count_traffic(kept, experts_N, neurons=neurons, width=64, itemsize=2)
    assert traffic.once / traffic.dense == pytest.approx(bound(ratio, rows), rel=0.01)
    assert traffic.requested / traffic.dense == pytest.approx(2 * ratio * rows / 3)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_for_gpus_without_spilling(capability: int) -> None:
    from benchmarks.triton_resources import decode_resources

    for dtype in DTYPES[:2]:
        launches = list(decode_resources(dtype, 16384 if capability == 100 else 1408, 2048, capability))
        assert {launch.kernel for launch in launches} == {"select", "by threshold", "up, down", "sum"}
        assert [launch for launch in launches if launch.stack > 16] == []
