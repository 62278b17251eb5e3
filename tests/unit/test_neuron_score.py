"""Scores other than |act(gate)|: experts against loops over tokens and neurons, and options that do not fit."""

import pytest
import torch

from mone_model.activations import ACTIVATIONS
from mone_model.config import NEURON_SCORES, ComputeConfig, ModelConfig, ParallelConfig
from mone_model.expert_backends import BACKENDS, DENSE_BACKENDS, Request
from mone_model.hf import configuration_mone
from mone_model.hf.modeling_mone import frozen_projection as frozen_in_transformers
from mone_model.neuron_score import frozen_projection, score_neurons
from mone_model.neuron_selection import TopK
from tests.tiny import TINY_MODEL

E, N, D, H, K = 3, 20, 16, 24, 6
DETERMINED = [score for score in NEURON_SCORES if not score.startswith("random")]


def make_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {"x": random(N, D), "gate_up": random(E, 2, H, D), "down": random(E, H, D), "probs": random(N)}


def by_loops(score: str, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """The formula of `mone_model.neuron_score` for each token by itself."""
    frozen = frozen_projection(range(E), H, D).double()
    rows = []
    for n, expert in enumerate([0] * 7 + [1] * 4 + [2] * 9):
        z, up = gate_up[expert, 0] @ x[n], gate_up[expert, 1] @ x[n]
        active = z / (1 + torch.exp(-z))
        key = {
            "abs_gate": active.abs(),
            "gate": active,
            "abs_gate_up": (active * up).abs(),
            "preactivation": z.abs(),
            "frozen": (frozen[expert] @ x[n]).abs(),
        }[score]
        best = sorted(range(H), key=lambda j, key=key: -float(key[j]))[:K]  # type: ignore[misc]
        rows.append(sum(active[j] * up[j] * down[expert, j] for j in best) * probs[n])
    return torch.stack(rows)


@pytest.mark.parametrize("score", DETERMINED)
@pytest.mark.parametrize("backend", DENSE_BACKENDS)
def test_experts_keep_the_neurons_with_the_best_score(score: str, backend: str) -> None:
    inputs, tokens_E = make_inputs(), torch.tensor([7, 4, 9])
    expected = by_loops(score, **inputs)
    weight = torch.randn(N, D, generator=torch.Generator().manual_seed(5)).double()
    gradients = torch.autograd.grad((expected * weight).sum(), list(inputs.values()))
    single = {name: value.detach().float().requires_grad_() for name, value in inputs.items()}
    frozen = frozen_projection(range(E), H, D) if score == "frozen" else None
    request = Request(TopK(K), "silu", counting=True, score=score, frozen_EHD=frozen)
    weights = BACKENDS[backend].prepare(single["gate_up"], single["down"])
    output = BACKENDS[backend].compute(weights, single["x"], tokens_E, single["probs"], request)
    torch.testing.assert_close(output.out_ND, expected.float(), rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad((output.out_ND * weight.float()).sum(), list(single.values()))
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-3)
    assert output.load_EH is not None
    assert output.load_EH.sum(1).tolist() == [K * tokens for tokens in tokens_E.tolist()]


def test_scores_differ_where_they_should() -> None:
    z = torch.tensor([[-8.0, -1.0, 0.5, 2.0]])
    up = torch.tensor([[1.0, 10.0, 0.1, 1.0]])
    active = ACTIVATIONS["silu"].function(z)
    order = {
        score: score_neurons(score, gate_NH=z, active_NH=active, up_NH=up)[0].argsort(descending=True).tolist()
        for score in ("abs_gate", "gate", "abs_gate_up", "preactivation")
    }
    assert order == {
        "abs_gate": [3, 2, 1, 0],  # 1.76, 0.31, 0.27, 0.003
        "gate": [3, 2, 0, 1],
        "abs_gate_up": [1, 3, 2, 0],
        "preactivation": [0, 3, 1, 2],
    }


def test_nan_is_kept_first() -> None:
    z = torch.tensor([[1.0, torch.nan, -torch.inf]])
    for score in ("gate", "abs_gate_up", "preactivation"):
        found = score_neurons(score, gate_NH=z, active_NH=z, up_NH=torch.ones_like(z))
        assert not found.isnan().any()
        assert found[0, 1] == torch.inf


def test_random_scores_are_new_for_each_token_and_repeat_with_the_generator() -> None:
    request, tokens_E = Request(TopK(K), "silu", counting=True, score="random"), torch.tensor([7, 4, 9])
    single = {name: value.detach().float() for name, value in make_inputs().items()}
    weights = BACKENDS["loop"].prepare(single["gate_up"], single["down"])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(BACKENDS["loop"].compute(weights, single["x"], tokens_E, single["probs"], request))
    assert torch.equal(found[0].out_ND, found[1].out_ND)
    assert not torch.equal(found[0].out_ND, found[2].out_ND)
    load = found[0].load_EH
    assert load is not None
    assert ((load > 0).sum(1) > K).all(), "tokens of an expert keep different neurons"
    many = score_neurons("random", gate_NH=(z := torch.zeros(4000, 8)), active_NH=z, up_NH=z).topk(2).indices
    counts = torch.bincount(many.flatten(), minlength=8)
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()


def test_frozen_projections_do_not_depend_on_the_layout_and_are_those_of_transformers() -> None:
    whole = frozen_projection(range(4), H, D)
    assert torch.equal(whole[2:], frozen_projection([2, 3], H, D))
    for expert in range(4):
        torch.testing.assert_close(whole[expert], frozen_in_transformers(expert, H, D), rtol=1e-6, atol=1e-7)
    assert whole.std() == pytest.approx(D**-0.5, rel=0.1)


def test_options_that_do_not_fit_are_refused() -> None:
    assert NEURON_SCORES == configuration_mone.NEURON_SCORES, "that file cannot import ours"
    with pytest.raises(ValueError, match="neuron_score=best: choose from abs_gate, gate"):
        ModelConfig(neuron_score="best")
    with pytest.raises(ValueError, match="neuron_bias=True: needs model.neuron_score=abs_gate, not gate"):
        ModelConfig(neuron_score="gate", neuron_bias=True)
    from train.config import RunConfig
    from train.config_rules import validate

    for score, parallel, compute, said in (
        ("gate", ParallelConfig(), ComputeConfig(experts="sparse"), "needs model.neuron_score=abs_gate, not gate"),
        ("random", ParallelConfig(expert_tensor=2), ComputeConfig(), "needs whole experts: parallel.expert_tensor=1, not 2"),
    ):
        model = ModelConfig(**TINY_MODEL, neuron_score=score)
        config = RunConfig(model=model, parallel=parallel, compute=compute)
        with pytest.raises(ValueError, match=said):
            validate(config, 2)
