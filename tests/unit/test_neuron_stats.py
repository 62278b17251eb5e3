import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mone_model.neuron_balance import sum_by_expert
from mone_model.neuron_selection import select_neurons
from mone_model.neuron_stats import (
    NeuronCounters,
    NeuronUsage,
    gini,
    reduce_counters,
    summarise_experts,
    summarise_neurons,
    top_neuron_overlap,
)

K, H = 2, 6


def usage_of(tokens_E: list[int], gate_NH: torch.Tensor, batches: int = 1) -> NeuronUsage:
    counters = NeuronCounters(len(tokens_E), H, torch.device("cpu"))
    kept = select_neurons(gate_NH, K)
    tokens = torch.tensor(tokens_E)
    for _ in range(batches):
        counters.add(
            tokens_per_expert_E=tokens,
            threshold_N=kept.threshold_N,
            selected_EH=sum_by_expert(kept.mask_NH.float(), tokens),
            magnitude_EH=sum_by_expert(gate_NH.abs(), tokens),
        )
    return reduce_counters({0: counters}, num_layers=1, num_experts=len(tokens_E), num_neurons=H)


def test_counters_equal_a_count_by_hand() -> None:
    gate_NH = torch.randn(9, H, generator=torch.Generator().manual_seed(0))
    usage = usage_of([4, 0, 5], gate_NH, batches=3)
    assert usage.tokens_LE.tolist() == [[12, 0, 15]]
    for expert, rows in ((0, gate_NH[:4]), (2, gate_NH[4:])):
        sizes = rows.abs()
        best = sizes.sort(dim=-1, descending=True).values
        selected = 3 * (sizes >= best[:, K - 1 : K]).sum(0)
        assert usage.selected_LEH[0, expert].tolist() == selected.tolist()
        torch.testing.assert_close(usage.magnitude_LEH[0, expert], sizes.double().mean(0), rtol=1e-6, atol=0)
        assert usage.threshold_LE[0, expert].item() == pytest.approx(best[:, K - 1].mean().item(), rel=1e-6)
    assert usage.threshold_LE[0, 1] == 0


def test_dead_neurons_entropy_and_load() -> None:
    gate_NH = torch.tensor([[9.0, 8, 1, 1, 1, 1]] * 4 + [[1.0, 1, 1, 1, 8, 9]] * 2)
    usage = usage_of([4, 2], gate_NH)
    summary = summarise_neurons(usage, [K] * len(usage.tokens_LE))
    assert summary["dead"].tolist() == [pytest.approx(4 / 6)]
    assert summary["usage_entropy"].tolist() == [pytest.approx(math.log(2) / math.log(6))]
    assert summary["usage_gini"].tolist() == [pytest.approx(4 / 6)]
    assert summary["overlap"].tolist() == [0.0]
    load = summarise_experts(usage)
    assert load["load_max"].tolist() == [pytest.approx(4 / 3)]
    assert load["load_min"].tolist() == [pytest.approx(2 / 3)]


def test_experts_that_use_the_same_neurons_overlap_fully() -> None:
    assert top_neuron_overlap(torch.tensor([[5.0, 4, 1, 0], [9.0, 8, 0, 0]]), k=2) == 1
    assert math.isnan(top_neuron_overlap(torch.tensor([[5.0, 4, 1, 0], [0.0, 0, 0, 0]]), k=2))


def test_overlap_breaks_ties_by_index_and_leaves_out_what_is_never_used() -> None:
    # The first expert used 40 neurons equally often: its top 8 are the first 8.
    tied, first = torch.full((40,), 3.0), torch.zeros(40)
    first[:8] = torch.arange(8, 0, -1.0)
    assert top_neuron_overlap(torch.stack([tied, first]), k=8) == 1
    assert top_neuron_overlap(torch.stack([tied, first.flip(0)]), k=8) == 0
    # Some experts used fewer than k = 3 neurons.
    assert top_neuron_overlap(torch.tensor([[5.0, 0, 0, 0], [0, 7.0, 0, 0]]), k=3) == 0
    assert top_neuron_overlap(torch.tensor([[5.0, 0, 0, 0], [7.0, 0, 0, 0]]), k=3) == 1
    assert top_neuron_overlap(torch.tensor([[5.0, 0, 0, 0], [7.0, 0, 2.0, 0]]), k=3) == pytest.approx(2 / 3)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(any))
def test_gini_is_the_mean_difference(counts: list[int]) -> None:
    pairs = sum(abs(a - b) for a in counts for b in counts)
    expected = pairs / (2 * len(counts) * sum(counts))
    assert gini(torch.tensor(counts, dtype=torch.float64)).item() == pytest.approx(expected)
