import pytest
import torch

from mone_model.neuron_balance import Balance, neuron_balance_loss, neuron_sizes, sum_by_expert
from mone_model.neuron_selection import select_neurons

K, H = 3, 8
FORMS = ["normalised", "unmasked", "masked"]


def by_the_formula(gate_NH: torch.Tensor, mask_NH: torch.Tensor, tokens: list[int], form: str) -> torch.Tensor:
    """The formula as a loop over tokens and neurons."""
    losses, start = [], 0
    for count in tokens:
        rows = range(start, start + count)
        start += count
        if count == 0:
            continue
        loss = torch.zeros((), dtype=gate_NH.dtype)
        for j in range(H):
            f = H / (K * count) * sum(float(mask_NH[x, j]) for x in rows)
            p = torch.zeros((), dtype=gate_NH.dtype)
            for x in rows:
                size = gate_NH[x, j].abs()
                if form == "normalised":
                    size = size / gate_NH[x].abs().sum()
                elif form == "masked":
                    size = size * mask_NH[x, j]
                p = p + size / count
            loss = loss + f * p
        losses.append(loss)
    return torch.stack(losses).mean()


def loss_of(gate_NH: torch.Tensor, tokens: list[int], form: str) -> torch.Tensor:
    mask_NH = select_neurons(gate_NH, K).mask_NH
    counts = torch.tensor(tokens)
    load_EH = sum_by_expert(mask_NH.float(), counts)
    sizes_EH = neuron_sizes(gate_NH, mask_NH, counts, Balance(form))
    return neuron_balance_loss(sizes_EH=sizes_EH, load_EH=load_EH, tokens_per_expert_E=counts, k=K)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [[5, 7], [0, 12], [4, 0, 8]])
def test_value_and_gradient_equal_the_formula(form: str, tokens: list[int]) -> None:
    gate = torch.randn(12, H, generator=torch.Generator().manual_seed(0))
    ours, theirs = gate.clone().requires_grad_(), gate.clone().requires_grad_()
    loss = loss_of(ours, tokens, form)
    expected = by_the_formula(theirs, select_neurons(gate, K).mask_NH, tokens, form)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_without_any_token_the_loss_is_zero_and_finite() -> None:
    gate_NH = torch.empty(0, H, requires_grad=True)
    loss = loss_of(gate_NH, [0, 0], "normalised")
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("form", FORMS)
def test_a_stride_reads_a_share_of_each_experts_tokens_and_is_right_on_average(form: str) -> None:
    tokens, stride = torch.tensor([12, 0, 6]), 3
    active_NH = torch.randn(18, H, generator=torch.Generator().manual_seed(2))
    mask_NH = select_neurons(active_NH, K).mask_NH
    every_EH = neuron_sizes(active_NH, mask_NH, tokens, Balance(form))
    # From each of the first tokens: together they read every token once.
    sums_EH = torch.zeros_like(every_EH)
    for first in range(stride):
        rows = torch.cat([torch.arange(12).roll(-first), 12 + torch.arange(6).roll(-first)])
        sums_EH += neuron_sizes(active_NH[rows], mask_NH[rows], tokens, Balance(form, stride))
    torch.testing.assert_close(sums_EH, every_EH)
    load_EH = sum_by_expert(mask_NH.float(), tokens)
    losses = [
        neuron_balance_loss(sizes_EH=sizes_EH, load_EH=load_EH, tokens_per_expert_E=tokens, k=K, stride=stride)
        for sizes_EH in (every_EH / stride, neuron_sizes(active_NH, mask_NH, tokens, Balance(form, stride)))
    ]
    expected = neuron_balance_loss(sizes_EH=every_EH, load_EH=load_EH, tokens_per_expert_E=tokens, k=K)
    torch.testing.assert_close(losses[0], expected)
    assert losses[1] == pytest.approx(expected.item(), rel=0.5)
    assert losses[1] != expected


def test_balanced_neurons_give_one() -> None:
    # Each neuron is selected in three of eight tokens, and all gates have the same size up to a tie-breaking difference.
    gate_NH = torch.stack([torch.ones(H).index_add(0, torch.arange(x, x + K) % H, torch.full((K,), 1e-4)) for x in range(H)])
    assert loss_of(gate_NH, [H], "normalised").item() == pytest.approx(1, abs=1e-5)


def test_only_the_normalised_form_survives_a_smaller_gate() -> None:
    gate_NH = torch.randn(64, H, generator=torch.Generator().manual_seed(1))
    ratio = {form: (loss_of(0.1 * gate_NH, [64], form) / loss_of(gate_NH, [64], form)).item() for form in FORMS}
    assert ratio["normalised"] == pytest.approx(1, abs=1e-5)
    assert ratio["unmasked"] == pytest.approx(0.1, abs=1e-5)
    assert ratio["masked"] == pytest.approx(0.1, abs=1e-5)
