import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_model.neuron_selection import select_neurons, select_neurons_reference

# Few distinct values, so that ties are the rule.
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


def test_no_rows_is_no_trouble() -> None:
    kept = select_neurons(torch.empty(0, 8), 3)
    assert kept.mask_NH.shape == (0, 8)
    assert kept.threshold_N.shape == (0,)


@pytest.mark.parametrize("k", [0, 9])
def test_refuses_impossible_k(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}"):
        select_neurons(torch.zeros(1, 8), k)
