"""Experts for few rows, and selection by thresholds."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.gpt import GPTModel

from mone_model.activations import ACTIVATIONS
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.expert_backends import (
    BACKENDS,
    ExpertBackend,
    ExpertOutput,
    expert_gemm_loop,
    measure_max_decode_rows,
)
from mone_model.kernels.cpu import experts as cpu
from mone_model.megatron.calibration import counting_magnitudes, select_by_threshold
from mone_model.megatron.gpt import build_gpt, moe_layers
from mone_model.neuron_selection import scores_of, select_neurons_reference, unpack
from mone_model.thresholds import AtLeast, find_thresholds, shares_reaching
from tests.tiny import TINY_MODEL

MODEL = ModelConfig(**TINY_MODEL)
Few = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def few(tokens: list[int], width: int, neurons: int, dtype: torch.dtype = torch.float32) -> Few:
    """x, gate and up, down, routing weights, rows of each expert."""
    generator = torch.Generator().manual_seed(sum(tokens) + width + neurons)
    rows, experts = sum(tokens), len(tokens)
    x, gate_up = torch.randn(rows, width, generator=generator), torch.randn(experts, 2, neurons, width, generator=generator)
    down, probs = torch.randn(experts, neurons, width, generator=generator), torch.rand(rows, generator=generator)
    return x.to(dtype), gate_up.mul_(width**-0.5).to(dtype), down.mul_(neurons**-0.5).to(dtype), probs, torch.tensor(tokens)


def dense(inputs: Few, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Activated gates, and ups, [N, H] fp32."""
    x, gate_up, _, _, tokens_E = inputs
    both_N2H = expert_gemm_loop(x.float(), gate_up.float().flatten(1, 2).transpose(1, 2), tokens_E)
    gate_NH, up_NH = both_N2H.chunk(2, dim=-1)
    return ACTIVATIONS[activation].function(gate_NH), up_NH


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    words=st.integers(1, 20),
    neurons=st.integers(1, 300),
    share=st.floats(0, 1),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_a_few_rows_equal_the_reference(tokens: list[int], words: int, neurons: int, share: float, activation: str) -> None:
    inputs, k = few(tokens, 16 * words, neurons), max(1, round(share * neurons))
    x, gate_up, down, probs, tokens_E = inputs
    decoded = cpu.decode(*inputs, k, activation)
    mask_NH = unpack(decoded.masks_NW, neurons)
    assert (mask_NH.sum(-1) == k).all()
    gate_NH, up_NH = dense(inputs, activation)
    # Rounding can change the order near ties: the choice of neurons is compared with a tolerance.
    kept, dropped = gate_NH.abs().masked_fill(~mask_NH, torch.inf), gate_NH.abs().masked_fill(mask_NH, -1)
    assert (kept.amin(-1) >= dropped.amax(-1) - 1e-5).all()
    expected = expert_gemm_loop(gate_NH * up_NH * mask_NH * probs[:, None], down, tokens_E)
    torch.testing.assert_close(decoded.out_ND, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_a_threshold_keeps_all_gates_that_reach_it(activation: str, dtype: torch.dtype) -> None:
    inputs = few([1, 0, 3], 48, 70, dtype)
    gate_NH, up_NH = dense(inputs, activation)
    # Between two magnitudes, so that rounding does not matter.
    sizes = gate_NH.abs().flatten().unique()
    middle = len(sizes) // 2
    threshold = float((sizes[middle] + sizes[middle + 1]) / 2)
    mask_NH = gate_NH.abs() >= threshold
    decoded = cpu.decode(*inputs, 1, activation, threshold=threshold)
    assert torch.equal(unpack(decoded.masks_NW, 70), mask_NH)
    expected = expert_gemm_loop(gate_NH * up_NH * mask_NH * inputs[3][:, None], inputs[2].float(), inputs[4])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(decoded.out_ND.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_nan_row_selects_like_the_reference(threshold: float | None) -> None:
    inputs = few([2, 1], 32, 70)
    inputs[0][1, 3] = torch.nan  # every gate of this row; other rows do not change
    mask_NH = unpack(cpu.decode(*inputs, 20, "silu", threshold=threshold).masks_NW, 70)
    gate_NH = scores_of(dense(inputs, "silu")[0])
    expected_NH = gate_NH >= threshold if threshold is not None else select_neurons_reference(gate_NH, 20).mask_NH
    assert torch.equal(mask_NH, expected_NH)
    assert mask_NH[1].sum() == (70 if threshold is not None else 20)


def test_a_model_that_is_not_a_number_can_be_calibrated_and_run_by_thresholds(model: GPTModel) -> None:
    model.embedding.word_embeddings.weight.data[7] = torch.nan
    tokens_BS = torch.full((1, 16), 7)
    thresholds = find_thresholds(count_magnitudes(model, [tokens_BS]), ratio=0.25)
    assert thresholds == [torch.inf, torch.inf]
    select_by_threshold(model, thresholds)
    assert logits_of(model, tokens_BS)[..., :64].isnan().all()


def test_threads_do_not_change_a_bit() -> None:
    inputs, threads, results = few([2, 1, 1], 64, 500), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(cpu.decode(*inputs, 50, "silu"))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result.out_ND, results[0].out_ND)
        assert torch.equal(result.masks_NW, results[0].masks_NW)


@pytest.fixture
def model(one_process: None) -> GPTModel:
    return build_gpt(MODEL, ParallelConfig(), ComputeConfig(experts="loop"), seed=3).eval()


def logits_of(model: GPTModel, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens_BS, torch.arange(tokens_BS.size(1)).expand_as(tokens_BS), None)


def count_magnitudes(model: GPTModel, batches: list[torch.Tensor]) -> torch.Tensor:
    with counting_magnitudes(model) as counts_LM:
        for tokens_BS in batches:
            logits_of(model, tokens_BS)
    return counts_LM


def random_tokens(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(64, (rows, 16), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("per", ["layer", "model"])
def test_thresholds_keep_the_requested_share(model: GPTModel, per: str) -> None:
    counts_LM = count_magnitudes(model, [random_tokens(8, seed) for seed in range(2)])
    rows = 2 * 8 * 16 * MODEL.router_topk
    assert counts_LM.sum(-1).tolist() == [rows * MODEL.moe_ffn_hidden_size] * MODEL.num_layers
    thresholds = find_thresholds(counts_LM, ratio=0.25, per=per)
    shares = torch.tensor(shares_reaching(counts_LM, thresholds))
    if per == "model":
        assert len(set(thresholds)) == 1
        shares = shares.mean()
    assert ((shares >= 0.25) & (shares < 0.26)).all()
    before = logits_of(model, random_tokens(8, 0))
    select_by_threshold(model, thresholds)
    assert [experts.rule for _, experts, _ in moe_layers(model)] == [AtLeast(value) for value in thresholds]
    assert not torch.equal(logits_of(model, random_tokens(8, 0)), before)


def test_a_threshold_of_zero_keeps_all(model: GPTModel) -> None:
    counts_LM = count_magnitudes(model, [random_tokens(1, 0)])
    assert shares_reaching(counts_LM, find_thresholds(counts_LM, ratio=1.0)) == [1.0, 1.0]
    zeros = torch.zeros(2, 2**16, dtype=torch.int64)
    zeros[:, 0] = 5
    assert find_thresholds(zeros, ratio=0.5) == [0.0, 0.0]
    assert shares_reaching(zeros, [0.0, 0.0]) == [1.0, 1.0]


def test_the_switch_is_where_the_dense_experts_become_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    class Timed(ExpertBackend):
        def __init__(self, seconds: Callable[[int], float]) -> None:
            self.seconds = seconds

        def compute(self, weights: Any, x_ND: torch.Tensor, *_: Any) -> ExpertOutput:
            clock[0] += self.seconds(len(x_ND))
            return ExpertOutput(x_ND)

    def measured(of_few: Callable[[int], float], experts: int = 16) -> int:
        monkeypatch.setitem(BACKENDS, "decode", Timed(of_few))
        monkeypatch.setitem(BACKENDS, "loop", Timed(lambda rows: 5))
        return measure_max_decode_rows(32, 64, experts, 8, "silu", torch.float32, "loop")

    assert measured(lambda rows: 1 + rows) == 4
    assert measured(lambda rows: 6) == 0
    assert measured(lambda rows: 1) == 256
    # 16 experts are measured; as many rows in each of 128 experts are eight times as many.
    assert measured(lambda rows: rows / 8, experts=128) == 8 * 32
    assert measured(lambda rows: 1 + rows, experts=128) == 4  # no expert has two rows
    assert measured(lambda rows: 1 + rows, experts=1) == 4
