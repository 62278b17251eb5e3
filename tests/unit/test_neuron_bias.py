"""Balancing by a bias on the scores of the neurons: selection, values, gradients, updates and checkpoints."""

from typing import Any

import pytest
import torch

from mone_model.activations import ACTIVATIONS
from mone_model.config import EXPERT_BACKENDS
from mone_model.expert_backends import BACKENDS, Request, Rule
from mone_model.neuron_bias import update_neuron_bias
from mone_model.neuron_selection import TopK
from mone_model.thresholds import AtLeast

TOKENS, WIDTH, NEURONS, K = torch.tensor([5, 0, 9, 2]), 16, 24, 6
RULES: list[Rule] = [TopK(K), AtLeast(1.0)]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def computed(name: str, rule: Rule, activation: str, **request: Any) -> list[torch.Tensor]:
    """The output, and the gradients unless the backend is for inference."""
    count = int(TOKENS.sum())
    weights = random(4, 2, NEURONS, WIDTH, seed=2) * 0.4, random(4, NEURONS, WIDTH, seed=3)
    inputs = random(count, WIDTH), *weights, random(count, seed=4).abs()
    x_ND, gate_up_E2HD, down_EHD, probs_N = (tensor.requires_grad_(name != "decode") for tensor in inputs)
    backend = BACKENDS[name]
    prepared = backend.prepare(gate_up_E2HD, down_EHD)
    out_ND = backend.compute(prepared, x_ND, TOKENS, probs_N, Request(rule, activation, **request)).out_ND
    if name == "decode":
        return [out_ND]
    return [out_ND.detach(), *torch.autograd.grad(out_ND.square().sum(), [x_ND, gate_up_E2HD, down_EHD, probs_N])]


def defined(rule: Rule, activation: str, bias_EH: torch.Tensor) -> torch.Tensor:
    """The output as a loop over rows and neurons in float64."""
    x_ND, gate_up = random(16, WIDTH).double(), random(4, 2, NEURONS, WIDTH, seed=2).double() * 0.4
    down, probs_N = random(4, NEURONS, WIDTH, seed=3).double(), random(16, seed=4).abs().double()
    out = []
    for x, prob, e in zip(x_ND, probs_N, torch.arange(4).repeat_interleave(TOKENS).tolist(), strict=True):
        gates = ACTIVATIONS[activation].function(gate_up[e, 0] @ x)
        scores = gates.abs() + bias_EH[e].double()
        if isinstance(rule, TopK):
            kept = sorted(range(NEURONS), key=lambda j: (-float(scores[j]), j))[: rule.k]
        else:
            kept = [j for j in range(NEURONS) if scores[j] >= rule.threshold]
        out.append(prob * sum((gates[j] * (gate_up[e, 1, j] @ x) * down[e, j] for j in kept), torch.zeros(WIDTH)))
    return torch.stack(out).float()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_bias_steers_the_selection_and_changes_no_value(rule: Rule, activation: str) -> None:
    bias_EH = random(4, NEURONS, seed=5).abs()
    expected = defined(rule, activation, bias_EH)
    without = computed("loop", rule, activation)[0]
    assert (without - expected).norm() > 0.01 * expected.norm(), "the bias must change the selection"
    for name in (*EXPERT_BACKENDS, "decode"):
        found = computed(name, rule, activation, bias_EH=bias_EH)
        assert (found[0] - expected).norm() <= 1e-6 * expected.norm(), name
        for gradient, of_loop in zip(found, computed("loop", rule, activation, bias_EH=bias_EH), strict=False):
            assert (gradient - of_loop).norm() <= 1e-6 * of_loop.norm(), name


@pytest.mark.parametrize("name", [*EXPERT_BACKENDS, "decode"])
def test_a_constant_bias_changes_nothing(name: str) -> None:
    for with_bias, without in zip(
        computed(name, TopK(K), "silu", bias_EH=torch.full((4, NEURONS), 0.5)), computed(name, TopK(K), "silu"), strict=True
    ):
        assert (with_bias - without).norm() <= (0 if name in ("sparse", "decode") else 1e-6) * without.norm()


def test_an_update_follows_the_formula() -> None:
    load_EH, tokens_E = torch.tensor([[4.0, 0, 1, 3], [0, 0, 0, 0]]), torch.tensor([4, 0])
    bias_EH = torch.tensor([[0.0, 0.5, 0.25, 0.0], [0.25, 0.0, 0.5, 0.0]])
    update_neuron_bias(bias_EH, load_EH, tokens_E, k=2, neurons=4, rate=0.125)  # the mean load is 2
    # The first and last fell below 0; the smallest is 0 again. An expert without tokens keeps its bias.
    assert bias_EH.tolist() == [[0.0, 0.75, 0.5, 0.0], [0.25, 0.0, 0.5, 0.0]]


def test_updates_balance_the_load() -> None:
    scale_H = torch.linspace(0.2, 2.0, 32)
    bias_EH, deviation = torch.zeros(1, 32), []
    for step in range(300):
        score_NH = (random(256, 32, seed=step) * scale_H).abs() + bias_EH
        kept_NH = torch.zeros_like(score_NH).scatter_(1, score_NH.topk(8).indices, 1)
        deviation.append((kept_NH.mean(0) / kept_NH.mean() - 1).abs().mean().item())
        update_neuron_bias(bias_EH, kept_NH.sum(0)[None], torch.tensor([256]), k=8, neurons=32, rate=0.01)
    assert deviation[0] > 0.5
    assert sum(deviation[-20:]) / 20 < 0.2
