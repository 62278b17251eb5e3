"""What is computed otherwise on CPUs, from RMSNorm to the norm of gradients, against torch and Megatron-Core."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_model.activations import ACTIVATIONS
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.kernels.cpu import attention as cpu_attention
from mone_model.kernels.cpu import cross_entropy as cpu_cross_entropy
from mone_model.kernels.cpu import library as cpu_library
from mone_model.kernels.cpu import permutation as cpu_permutation
from mone_model.kernels.cpu import rms_norm as cpu_rms_norm
from mone_model.kernels.cpu import rotary as cpu_rotary
from mone_model.kernels.cpu import router as cpu_router
from mone_model.kernels.cpu import swiglu as cpu_swiglu
from mone_model.megatron.gpt import build_gpt
from mone_model.megatron.layer_spec import RMSNorm
from mone_model.megatron.transformer_config import transformer_config
from tests.tiny import TINY_MODEL
from tests.unit.test_attention import formula

Layer = Callable[..., torch.Tensor]


def assert_equal(fast: Layer, reference: Layer, *inputs: torch.Tensor, threads: int) -> None:
    """Values and gradients of all inputs; the reference is computed in fp64."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y, expected = fast(*leaves), reference(*doubles)
    # As the backward pass of attention gives it: not contiguous.
    target = torch.randn(y.shape[::-1], generator=torch.Generator().manual_seed(1)).permute(*range(y.dim() - 1, -1, -1))
    results = y, *torch.autograd.grad(y, leaves, target)
    torch.set_num_threads(before)
    for ours, theirs in zip(results, (expected, *torch.autograd.grad(expected, doubles, target.double())), strict=True):
        largest = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6 * largest)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 300),
    width=st.integers(8, 200),
    more=st.integers(0, 9),
    threads=st.sampled_from([1, 2, 7]),
)
def test_rms_norm_equals_its_formula(seed: int, rows: int, width: int, more: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, width + more, generator=generator)[:, :, :width]  # rows that lie apart
    weight = torch.randn(width, generator=generator)
    assert_equal(
        lambda x, weight: cpu_rms_norm.rms_norm(x, weight, 1e-5),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight,
        x,
        weight,
        threads=threads,
    )


@pytest.mark.parametrize(("dtype", "by_kernel"), [(torch.float32, True), (torch.bfloat16, False)])
def test_norms_of_layers_are_the_same_with_and_without_the_kernel(
    dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformer_config(ModelConfig(**TINY_MODEL), ParallelConfig(), ComputeConfig())
    norm = RMSNorm(config, 32).to(dtype)
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    kernel = mock.Mock(wraps=cpu_rms_norm.rms_norm)
    monkeypatch.setattr(cpu_rms_norm, "rms_norm", kernel)
    results = [norm(x)]
    assert kernel.called == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors: False)
    torch.testing.assert_close(norm(x), results[0])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 80),
    half=st.integers(1, 70),
    more=st.integers(0, 9),
    threads=st.sampled_from([1, 2, 7]),
)
def test_rotation_turns_pairs_by_their_angle(seed: int, length: int, half: int, more: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, 2, 3, 2 * half + more, generator=generator)[..., : 2 * half]
    angles = 10 * torch.randn(length, 1, 1, half, generator=generator).repeat(1, 1, 1, 2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1))
        turned = pairs * torch.polar(torch.ones(1, dtype=torch.double), angles[..., :half].double())
        return torch.cat([turned.real, turned.imag], dim=-1)

    assert_equal(lambda x: cpu_rotary.rotate(x, angles), turn, x, threads=threads)


@pytest.mark.parametrize(
    ("options", "rotated", "dtype", "by_kernel"),
    [
        ({"rotary_interleaved": False, "mscale": 1.0}, 32, torch.float32, True),
        ({"mscale": 1.5}, 32, torch.float32, False),
        ({"rotary_interleaved": True}, 32, torch.float32, False),
        ({}, 16, torch.float32, False),
        ({}, 32, torch.bfloat16, False),
    ],
    ids=["plain", "scaled", "interleaved", "half of a head", "bf16"],
)
def test_megatron_core_rotates_the_same_with_and_without_the_kernel(
    options: dict[str, object], rotated: int, dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.common.embeddings import rope_utils  # after mone_model, which prepares torch.compile

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 2, 3, 32, generator=generator).to(dtype)
    angles = torch.randn(24, 1, 1, rotated // 2, generator=generator).repeat(1, 1, 1, 2)
    kernel = mock.Mock(wraps=cpu_rotary.rotate)
    monkeypatch.setattr(cpu_rotary, "rotate", kernel)
    results = [rope_utils._apply_rotary_pos_emb_bshd(x, angles, **options)]
    assert kernel.called == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors: False)
    results.append(rope_utils._apply_rotary_pos_emb_bshd(x, angles, **options))
    torch.testing.assert_close(*results)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 300),
    neurons=st.integers(1, 200),
    spread=st.sampled_from([1, 30]),
    threads=st.sampled_from([1, 2, 7]),
)
def test_swiglu_equals_its_formula(seed: int, rows: int, neurons: int, spread: float, threads: int) -> None:
    gate_up = spread * torch.randn(rows, 2, 2 * neurons, generator=torch.Generator().manual_seed(seed))

    def gated(gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate / (1 + (-gate).exp()) * up

    assert_equal(cpu_swiglu.swiglu, gated, gate_up, threads=threads)


@pytest.mark.parametrize(
    ("activation", "dtype", "by_kernel"),
    [("silu", torch.float32, True), ("silu", torch.bfloat16, True), ("gelu", torch.float32, False)],
)
def test_shared_experts_are_the_same_with_and_without_the_kernel(
    activation: str, dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch, one_process: None
) -> None:
    model = ModelConfig(**TINY_MODEL | {"activation": activation, "init_std": 0.5})
    gpt = build_gpt(model, ParallelConfig(), ComputeConfig(experts="grouped"), seed=1)
    shared = gpt.decoder.layers[0].mlp.shared_experts.to(dtype)
    first, second = shared.linear_fc1.weight, shared.linear_fc2.weight
    x_SBD = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    inputs = x_SBD, first, second

    def results(y: torch.Tensor, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    kernel = mock.Mock(wraps=cpu_swiglu.swiglu)
    monkeypatch.setattr(cpu_swiglu, "swiglu", kernel)
    computed = [results(shared(x_SBD), inputs)]
    assert kernel.called == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors, **options: False)
    computed.append(results(shared(x_SBD), inputs))
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    gate, up = (doubles[0] @ doubles[1].T).chunk(2, dim=-1)
    expected = results((ACTIVATIONS[activation].function(gate) * up) @ doubles[2].T, doubles)
    for of_layer in computed:
        for ours, exact in zip(of_layer, expected, strict=True):
            difference = (ours.double() - exact).norm() / exact.norm()
            assert difference < (1e-6 if dtype == torch.float32 else 1e-2)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.one_of(st.integers(1, 100), st.integers(380, 800)),  # of which the longer have several chunks of keys
    groups=st.integers(1, 3),
    heads_of_group=st.integers(1, 3),
    width=st.integers(8, 70),
    more=st.integers(0, 9),
    threads=st.sampled_from([1, 2, 7]),
)
def test_attention_equals_its_formula(
    seed: int, length: int, groups: int, heads_of_group: int, width: int, more: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = heads_of_group * groups
    q, k, v = (torch.randn(length, 2, n, width + more, generator=generator)[..., :width] for n in (heads, groups, groups))
    # Smaller values, lest a query's gradient be a difference of sums over a head's channels that are larger than the rest.
    assert_equal(cpu_attention.attend, formula, q, k, v / width**0.5, threads=threads)


def test_the_loss_starts_from_the_largest_logits() -> None:
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    logits = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 7], logits[1, 1, 3] = torch.nan, torch.inf
    same, largest = VocabParallelCrossEntropy.calculate_logits_max(logits)
    assert same is logits
    torch.testing.assert_close(largest, logits.max(-1).values, equal_nan=True, rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 60),
    words=st.integers(1, 40),
    rank=st.integers(0, 2),
    threads=st.sampled_from([1, 2, 7]),
)
def test_cross_entropy_equals_its_formula(seed: int, rows: int, words: int, rank: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = 16 * words
    logits = 5 * torch.randn(rows, 2, vocabulary, generator=generator)
    targets = torch.randint(3 * vocabulary, (rows, 2), generator=generator)  # of three ranks that share the vocabulary
    place = targets - rank * vocabulary
    here = (place >= 0) & (place < vocabulary)

    def formula(logits: torch.Tensor) -> torch.Tensor:
        chosen = logits.gather(-1, place.where(here, 0)[..., None])[..., 0]
        return logits.logsumexp(-1) - chosen * here

    # A rank that is alone with its part of the vocabulary.
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: 1)
    assert_equal(lambda x: cpu_cross_entropy.cross_entropy(x, targets, group), formula, logits, threads=threads)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "smoothing", "by_kernel"),
    [
        (48, torch.float32, 0.0, True),
        (50, torch.float32, 0.0, False),
        (48, torch.bfloat16, 0.0, False),
        (48, torch.float32, 0.1, False),
    ],
)
def test_the_loss_is_the_same_with_and_without_the_kernel(
    vocabulary: int,
    dtype: torch.dtype,
    smoothing: float,
    by_kernel: bool,
    one_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 2, vocabulary, generator=generator).to(dtype)
    targets = torch.randint(vocabulary, (7, 2), generator=generator)
    kernel = mock.Mock(wraps=cpu_cross_entropy.cross_entropy)
    monkeypatch.setattr(cpu_cross_entropy, "cross_entropy", kernel)
    losses = [vocab_parallel_cross_entropy(logits.clone(), targets, smoothing)]
    assert kernel.called == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors: False)
    losses.append(vocab_parallel_cross_entropy(logits.clone(), targets, smoothing))
    torch.testing.assert_close(*losses)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 400),
    experts=st.integers(1, 70),
    part=st.floats(0, 1),
    over_all=st.booleans(),
    threads=st.sampled_from([1, 2, 7]),
)
def test_experts_are_chosen_and_scored(
    seed: int, rows: int, experts: int, part: float, over_all: bool, threads: int
) -> None:
    k = max(1, round(part * experts))
    logits = 3 * torch.randn(experts, rows, generator=torch.Generator().manual_seed(seed)).T
    expected = torch.zeros(rows, experts, dtype=torch.bool).scatter(1, logits.topk(k).indices, True)
    assert torch.equal(cpu_router.route(logits, k, over_all=over_all)[1], expected)

    def scores(logits: torch.Tensor) -> torch.Tensor:
        return (logits if over_all else logits.masked_fill(~expected, -torch.inf)).softmax(-1)

    assert_equal(lambda x: cpu_router.route(x, k, over_all=over_all)[0], scores, logits, threads=threads)


HARD = [-1.0, 0.0, 0.5, torch.nan, torch.inf]


@settings(deadline=None, max_examples=100)
@given(rows=st.lists(st.lists(st.sampled_from(HARD), min_size=19, max_size=19), min_size=1))
def test_as_many_experts_are_chosen_among_equals_and_among_nan(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    scores, chosen = cpu_router.route(logits, 4, over_all=False)
    assert torch.all(chosen.sum(1) == 4)
    ordered = logits.nan_to_num(torch.inf, torch.inf)
    for row, choice, score in zip(ordered, chosen, scores, strict=True):
        best = sorted(range(19), key=lambda expert: (-row[expert].item(), expert))[:4]
        assert choice.nonzero().flatten().tolist() == sorted(best)
        assert score.isnan().any() == row.isinf().any()


@pytest.mark.parametrize(
    ("options", "dtype", "by_kernel"),  # the choice, and the scores for the loss
    [
        ({}, torch.float32, 2),
        ({"use_pre_softmax": True}, torch.float32, 2),
        ({"scaling_factor": 2.5}, torch.float32, 2),
        ({}, torch.float64, 0),
        ({"num_groups": 3, "group_topk": 2}, torch.float32, 1),
        ({"score_function": "sigmoid"}, torch.float32, 0),
        ({"score_function": "sigmoid", "expert_bias": torch.arange(6.0)}, torch.float32, 0),
    ],
)
def test_routing_is_the_same_with_and_without_the_kernel(
    options: dict[str, Any], dtype: torch.dtype, by_kernel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe import router

    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    as_router_does = {"use_pre_softmax": False, "num_groups": None, "group_topk": None, "scaling_factor": None}
    as_router_does |= {"score_function": "softmax", "expert_bias": None, "fused": False, "router_replay": None} | options
    kernel = mock.Mock(wraps=cpu_router.route)
    monkeypatch.setattr(cpu_router, "route", kernel)

    def route() -> list[torch.Tensor]:
        aux = {"fused": False, "padding_mask": None}
        scores = router.compute_routing_scores_for_aux_loss(logits, 2, as_router_does["score_function"], **aux)
        return [*router.topk_routing_with_score_function(logits, 2, **as_router_does), *scores]

    results = route()
    assert kernel.call_count == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors: False)
    torch.testing.assert_close(results, route())


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 300),
    experts=st.integers(1, 20),
    width=st.integers(1, 100),
    part=st.floats(0, 1),  # tokens may choose different numbers of experts, or none
    threads=st.sampled_from([1, 2, 7]),
)
def test_tokens_go_to_their_experts_and_back(
    seed: int, tokens: int, experts: int, width: int, part: float, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, probs = torch.randn(width, tokens, generator=generator).T, torch.rand(experts, tokens, generator=generator).T
    chosen = torch.rand(tokens, experts, generator=generator) < part
    factors = torch.randn(int(chosen.sum()), width, generator=generator)

    def there_and_back(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        rows, probs_of_rows, token_of_rows = cpu_permutation.permute(x, chosen, probs)
        return cpu_permutation.unpermute(rows * probs_of_rows[:, None] * factors, token_of_rows, tokens)

    def one_by_one(x: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        expert, token = chosen.T.nonzero(as_tuple=True)
        rows = x[token] * probs[token, expert, None] * factors.to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, rows)

    assert_equal(there_and_back, one_by_one, x, probs, threads=threads)


@pytest.mark.parametrize(
    ("options", "weighted", "dtype", "by_kernel"),
    [
        ({}, True, torch.float32, True),
        ({}, False, torch.float32, True),
        ({}, True, torch.bfloat16, False),
        ({"drop_and_pad": True}, True, torch.float32, False),
    ],
)
def test_tokens_are_permuted_the_same_with_and_without_the_kernel(
    options: dict[str, Any], weighted: bool, dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer.moe import token_dispatcher

    generator = torch.Generator().manual_seed(0)
    x, probs = torch.randn(60, 24, generator=generator).to(dtype), torch.rand(60, 6, generator=generator).to(dtype)
    routing_map = torch.arange(60)[:, None] % 6 == torch.arange(6)
    kernel = mock.Mock(wraps=cpu_permutation.permute)
    monkeypatch.setattr(cpu_permutation, "permute", kernel)

    def permute() -> list[Any]:
        x_, weights = x.clone().requires_grad_(), {"probs": probs.clone().requires_grad_()} if weighted else {}
        permuted = token_dispatcher.permute(x_, routing_map, num_out_tokens=60, fused=False, **weights, **options)
        rows, probs_of_rows, indices = permuted
        shape = {"restore_shape": x.shape, "routing_map": routing_map, "fused": False}
        y = token_dispatcher.unpermute(rows, indices, **shape, **options)
        outputs = [y, *([probs_of_rows] if weighted else [])]
        return [
            *permuted,
            y,
            *torch.autograd.grad(outputs, [x_, *weights.values()], [output.detach() for output in outputs]),
        ]

    results = permute()
    assert kernel.called == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors: False)
    torch.testing.assert_close(results, permute(), rtol=0, atol=0)


def test_the_norm_of_many_gradients_is_exact(one_process: None) -> None:
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in ((1,), (5000,), (2**22 + 7,), (3, 1024))]
    norm = get_grad_norm_fp32(gradients)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).double().norm().item(), rel=2e-7)
