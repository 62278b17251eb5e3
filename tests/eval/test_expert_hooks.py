"""Selection inside the experts of models of transformers, against models whose activation drops neurons itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mone_common.console import UserError
from mone_eval.expert_hooks import HookedExperts, Rule, hook_experts
from tests.eval.tiny_models import FAMILIES, MIXTURES, TOKENS_BT, build, build_experts, expert_classes

EXPERT_CLASSES = list(expert_classes())


def best(active_NH: torch.Tensor, k: int) -> torch.Tensor:
    """The k numbers of each row with the largest magnitude, by a stable sort; 0 elsewhere."""
    order_NH = active_NH.abs().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(active_NH).scatter(-1, order_NH[..., :k], active_NH.gather(-1, order_NH[..., :k]))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(TOKENS_BT).logits
    return logits


def change_activation(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make every activation of a GLU return `change(act(gate))`; experts run in the loops of their own classes."""
    model.config._experts_implementation = "eager"
    for module in model.modules():
        for name in ("act_fn", "activation_fn", "activation"):
            if (act := getattr(module, name, None)) is not None:
                changed = _Changed(act, change)
                if name in module._modules:
                    module._modules[name] = changed
                else:
                    setattr(module, name, changed)


class _Changed(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act, self.change = act, change

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return self.change(self.act(gate))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_neurons_change_nothing_and_half_of_them_are_exactly_half(family: str) -> None:
    model = build(family)
    before = logits_of(model)
    hooked = hook_experts(model)
    for rule in (None, lambda one: Rule(k=one.neurons), lambda one: Rule(threshold=0.0)):
        for one in hooked:
            one.reset(rule(one) if rule else None)
        tolerance = 1e-6 * before.abs().max() if family == "llama4" else 0  # which multiplies in another order
        assert (logits_of(model) - before).abs().max() <= tolerance
        assert all(one.kept == one.seen > 0 for one in hooked)
    for one in hooked:
        one.reset(Rule(k=one.neurons // 2))
    logits_of(model)
    assert all(2 * one.kept == one.seen > 0 for one in hooked)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gpt_oss", "qwen3_5_moe", "qwen3_next")])
@pytest.mark.parametrize("ratio", [0.5, 0.125])
def test_the_k_best_neurons_are_kept(family: str, ratio: float) -> None:
    reference, model = build(family), build(family)
    hooked = hook_experts(model)
    widths = {one.neurons for one in hooked}
    change_activation(
        reference, lambda active: best(active, int(ratio * active.size(-1))) if active.size(-1) in widths else active
    )
    for one in hooked:
        one.reset(Rule(k=int(ratio * one.neurons)))
    expected = logits_of(reference)
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "llama"])
def test_neurons_that_reach_a_threshold_are_kept(family: str) -> None:
    reference, model = build(family), build(family)
    change_activation(reference, lambda active: torch.where(active.abs() >= 0.05, active, 0))
    hooked = hook_experts(model)
    for one in hooked:
        one.reset(Rule(threshold=0.05))
    expected = logits_of(reference)
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert all(0.05 < one.kept / one.seen < 0.95 for one in hooked)


@pytest.mark.parametrize(("family", "kind"), EXPERT_CLASSES, ids=[kind.__name__ for _, kind in EXPERT_CLASSES])
def test_every_class_of_experts_is_hooked_or_refused(family: str, kind: type) -> None:
    holder = nn.Module()
    holder.experts = experts = build_experts(kind)
    if not experts.has_gate:
        with pytest.raises(UserError, match=f"{kind.__name__} has no gate"):
            hook_experts(holder)
        return
    width = experts.gate_up_proj.shape[1 if experts.is_transposed else 2]
    x_ND = torch.randn(6, width)
    index_Nk = torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    weights_Nk = torch.rand(6, 2)
    with torch.no_grad():
        before = experts(x_ND, index_Nk, weights_Nk)
        (one,) = hook_experts(holder)
        torch.testing.assert_close(experts(x_ND, index_Nk, weights_Nk), before, rtol=0, atol=0)
        one.reset(Rule(k=one.neurons // 2))
        experts(x_ND, index_Nk, weights_Nk)
    assert 2 * one.kept == one.seen == 12 * one.neurons


def test_a_gate_of_its_own_is_ranked_by_what_multiplies_up() -> None:
    """gpt-oss: (up + 1) * gate * sigmoid(1.702 * gate), both clamped, gates and ups interleaved, with biases."""
    model = build("gpt_oss")
    experts = model.model.layers[0].mlp.experts
    x_ND, index_Nk, weights_Nk = torch.randn(5, 64), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    expected = torch.zeros(5, 64)
    for slot, expert in enumerate((0, 1)):
        gate_up = x_ND @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate_NH, up_NH = gate_up[:, ::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
        hidden_NH = best(gate_NH * torch.sigmoid(1.702 * gate_NH), 8) * (up_NH + 1)
        out_ND = hidden_NH @ experts.down_proj[expert] + experts.down_proj_bias[expert]
        expected += weights_Nk[:, slot, None] * out_ND
    first = hook_experts(model)[0]
    first.reset(Rule(k=8))
    with torch.no_grad():
        torch.testing.assert_close(experts(x_ND, index_Nk, weights_Nk), expected.detach(), rtol=1e-5, atol=1e-5)


def masks_of(rule: Rule, family: str = "qwen3_moe") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the first experts of a model: which neurons a rule keeps [N, H], their expert [N], and act(gate) [N, H]."""
    model = build(family)
    one: HookedExperts = hook_experts(model)[0]
    seen: list[Any] = []
    one.observe = seen.append
    one.reset(rule)
    logits_of(model)
    (rows,) = seen
    mask_NH = rule.mask(rows)
    assert mask_NH is not None
    assert rows.expert_N is not None
    return mask_NH, rows.expert_N, rows.active_NH


def test_a_static_rule_keeps_the_same_neurons_of_an_expert() -> None:
    static_EH = torch.rand(8, 32) < 0.5
    mask_NH, expert_N, _ = masks_of(Rule(static_EH=static_EH))
    assert expert_N.unique().numel() > 1
    assert torch.equal(mask_NH, static_EH[expert_N])


def test_random_neurons_are_fresh_for_each_token() -> None:
    mask_NH, _, _ = masks_of(Rule("random", k=8))
    assert (mask_NH.sum(1) == 8).all()
    assert 0.15 < mask_NH.float().mean(0).min() < mask_NH.float().mean(0).max() < 0.35


def test_other_criteria_rank_what_they_say() -> None:
    """SiLU(-8) is nearly 0: |act(gate)| drops such a neuron, the gate before its activation keeps it."""
    by_gate, _, active_NH = masks_of(Rule(k=16))
    before_activation, _, _ = masks_of(Rule("preactivation", k=16))
    assert (active_NH[by_gate].abs().mean() > active_NH[before_activation].abs().mean()).item()
    assert not torch.equal(by_gate, before_activation)


def test_experts_of_an_unknown_class_are_refused_by_name() -> None:
    class LoopExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(4, 8, 8))

    model = nn.Module()
    model.experts = LoopExperts()
    with pytest.raises(UserError, match="experts: LoopExperts is not a class of experts"):
        hook_experts(model)


def test_a_list_of_gated_layers_is_routed_and_layers_beside_experts_are_shared() -> None:
    hooked = hook_experts(build("deepseek_v2"))
    assert [(one.part, one.name.split(".", 3)[3]) for one in hooked] == [
        ("dense", "mlp"),
        *[("routed", "mlp.experts"), ("shared", "mlp.shared_experts")] * 3,
    ]
    layer = build("llama").model.layers[0].mlp
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = nn.ModuleList([layer, layer.__class__(layer.config)])
    assert [one.part for one in hook_experts(model)] == ["routed"] * 2


def test_every_family_of_the_papers_has_a_tiny_model() -> None:
    assert {"qwen3_moe", "mixtral", "deepseek_v2", "granitemoe", "olmoe", "gpt_oss", "qwen3_5_moe", "llama4"} <= {*MIXTURES}
