"""Select neurons inside the gated experts of any model of transformers, without changing its weights or its classes.

    hooked = hook_experts(model)                       # UserError names a class that cannot be hooked
    for experts in hooked:
        experts.rule = Rule(k=experts.neurons // 2)    # None: all neurons, as the model was
    model(input_ids)
    hooked[0].kept, hooked[0].seen                     # neurons kept and neurons computed since the last reset

Routed experts are reached through transformers' interface for experts: their forward becomes `grouped_mm`, which calls
`_apply_gate` of the instance. Shared experts and dense GLU layers are reached by hooks on their linear layers.

Shapes: N rows (a token in one of its experts), H neurons of an expert, E experts.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

from mone_common.console import UserError
from mone_model.neuron_selection import select_neurons


class Rows(NamedTuple):
    """What a rule and an observer see of the rows of one call."""

    gate_NH: torch.Tensor
    """The gate before its activation."""
    active_NH: torch.Tensor
    """act(gate), the factor of the up projection, whatever the GLU of the family is."""
    hidden_NH: torch.Tensor
    """act(gate) * up, the input of the down projection."""
    expert_N: torch.Tensor | None
    """The expert of each row; None: there is one expert."""


def _random(rows: Rows) -> torch.Tensor:
    return torch.rand(rows.active_NH.shape, device=rows.active_NH.device)


CRITERIA: dict[str, Callable[[Rows], torch.Tensor]] = {
    "abs_gate": lambda rows: rows.active_NH.abs(),
    "abs_gate_up": lambda rows: rows.hidden_NH.abs(),
    "preactivation": lambda rows: rows.gate_NH.abs(),
    "random": _random,
}
"""The score [N, H] by which neurons are ranked: |act(gate)| as in the paper (arXiv 2510.05781), and others as controls."""


@dataclass(frozen=True)
class Rule:
    """Which neurons of a row are kept: one of `k`, `threshold` and `static_EH`."""

    criterion: str = "abs_gate"
    """A name of `CRITERIA`; not used by `static_EH`."""
    k: int | None = None
    """Keep this many neurons with the largest score; among equals the lower index."""
    threshold: float | None = None
    """Keep the neurons whose score is at least this."""
    static_EH: torch.Tensor | None = field(default=None, compare=False)
    """Keep the same neurons of an expert for every token: a bool mask."""

    def mask(self, rows: Rows) -> torch.Tensor | None:
        """[N, H] bool, True for neurons that are kept; None if all are."""
        if self.static_EH is not None:
            static_EH = self.static_EH.to(rows.active_NH.device)
            return static_EH.expand(len(rows.active_NH), -1) if rows.expert_N is None else static_EH[rows.expert_N]
        if self.k is not None and self.k >= rows.active_NH.size(1):
            return None
        score_NH = CRITERIA[self.criterion](rows)
        if self.threshold is not None:
            return score_NH.nan_to_num(nan=torch.inf) >= self.threshold
        assert self.k is not None
        return select_neurons(score_NH, self.k).mask_NH


@dataclass(eq=False)
class HookedExperts:
    """The routed experts of a layer, its shared expert, or a dense GLU layer, which is one expert."""

    name: str
    """Name of the module."""
    part: str
    """routed, shared or dense."""
    experts: int
    """Number of experts E."""
    neurons: int
    """Neurons of an expert H."""
    trained: Rule | None = None
    """What this project's experts keep by their configuration; None: all neurons."""
    rule: Rule | None = None
    """What is kept now."""
    observe: Callable[[Rows], None] | None = None
    """Called with the rows of every call."""
    kept: int = 0
    """Neurons kept since the last reset, summed over rows."""
    seen: int = 0
    """Neurons computed since the last reset, summed over rows."""

    def reset(self, rule: Rule | None) -> None:
        """Set the rule, and the counters to zero."""
        self.rule, self.kept, self.seen = rule, 0, 0

    @torch.no_grad()
    def select(self, rows: Rows) -> torch.Tensor:
        """[N, H] act(gate) * up of the neurons that are kept, zero elsewhere."""
        if self.observe is not None:
            self.observe(rows)
        mask_NH = None if self.rule is None else self.rule.mask(rows)
        self.seen += rows.hidden_NH.numel()
        self.kept += rows.hidden_NH.numel() if mask_NH is None else int(mask_NH.sum())
        return rows.hidden_NH if mask_NH is None else rows.hidden_NH.masked_fill(~mask_NH, 0)


def main_part(hooked: Sequence[HookedExperts]) -> str:
    """Where neurons are selected unless other parts are named: in routed experts, or in the layers of a dense model."""
    return "routed" if any(one.part == "routed" for one in hooked) else "dense"


def by_layer(hooked: Sequence[HookedExperts], layer_names: Sequence[str]) -> list[list[HookedExperts]]:
    """The experts inside each layer, by the names of the layers."""
    return [[one for one in hooked if is_inside(one.name, layer)] for layer in layer_names]


def hook_experts(model: nn.Module) -> list[HookedExperts]:
    """Hook every gated expert and GLU layer of a model, in the order of its modules; all neurons are kept at first.

    The experts of this project's classes keep the K of their configuration at first, or their thresholds.

    Raises UserError for a class of experts that cannot be hooked: its neurons would silently all be kept.
    """
    hooked: dict[str, HookedExperts] = {}
    listed: set[str] = set()
    for name, module in model.named_modules():
        if type(module).__name__ == "Llama4TextMoe":
            hooked[f"{name}.experts"] = _hook_llama4(f"{name}.experts", module)
        elif hasattr(module, "_apply_gate"):
            if not module.has_gate:
                raise UserError(f"{name}: {type(module).__name__} has no gate to rank its neurons by")
            hooked[name] = _hook_routed(name, module)
    blocks = [_parent(name) for name in hooked]
    for name, module in model.named_modules():
        if (linears := _glu_of(module)) is not None:
            routed = _parent(name).endswith("experts")  # a list of experts
            listed |= {_parent(name)} if routed else set()
            part = "routed" if routed else "shared" if any(is_inside(name, block) for block in blocks) else "dense"
            hooked[name] = _hook_glu(name, module, part, linears)
    for name, module in model.named_modules():
        if name not in hooked.keys() | listed and (name.endswith("experts") or type(module).__name__.endswith("Experts")):
            raise UserError(f"{name}: {type(module).__name__} is not a class of experts whose neurons can be selected")
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return sorted(hooked.values(), key=lambda experts: order[experts.name])


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def is_inside(name: str, ancestor: str) -> bool:
    """Whether a module, by its name, is inside another one."""
    return name.startswith(f"{ancestor}.")


def _hook_routed(name: str, module: Any) -> HookedExperts:
    """Experts of a class that has transformers' interface."""
    down = module.down_proj
    experts = HookedExperts(
        name, "routed", module.num_experts, int(down.shape[1] if module.is_transposed else down.shape[2])
    )
    ours = type(module).__name__ == "MoneExperts"  # by name, since trust_remote_code makes a class of its own
    if ours:
        if module.neuron_bias is not None:
            raise UserError(f"{name}: use_neuron_bias=true: the study ranks neurons by |act(gate)| alone")
        if module.score != "abs_gate":
            raise UserError(f"{name}: neuron_score={module.score}: the study ranks neurons by |act(gate)|")
        experts.trained = Rule(k=module.k) if module.threshold is None else Rule(threshold=module.threshold)
        experts.rule = experts.trained
    stock = getattr(type(module), "_apply_gate", _default_apply_gate)
    plain = ours or (stock is _default_apply_gate and module.is_concatenated)
    expert_N: list[torch.Tensor] = []

    def apply_gate(self: Any, gate_up: torch.Tensor) -> torch.Tensor:
        numbers = gate_up.float() if ours else gate_up
        if plain:
            gate_NH, up_NH = numbers.chunk(2, dim=-1)
            active_NH = self.act_fn(gate_NH)
            hidden_NH = active_NH * up_NH
        else:
            gate_NH = numbers.chunk(2, dim=-1)[0] if self.is_concatenated else numbers[..., ::2]
            active_NH = _act_of_gate(self, stock, gate_NH)
            hidden_NH = stock(self, numbers)
        return experts.select(Rows(gate_NH, active_NH, hidden_NH, expert_N[-1])).to(gate_up.dtype)

    def forward(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
        expert_N[:] = [top_k_index.flatten().sort().values]  # grouped_mm sorts its rows by expert
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)

    module._apply_gate = types.MethodType(apply_gate, module)
    module.forward = types.MethodType(forward, module)
    return experts


def _act_of_gate(module: Any, glu: Callable[..., torch.Tensor], gate_NH: torch.Tensor) -> torch.Tensor:
    """glu(gate, 1) - glu(gate, 0), which is act(gate): the GLUs of transformers are affine in up between 0 and 1."""

    def of(up_NH: torch.Tensor) -> torch.Tensor:
        if module.is_concatenated:
            return glu(module, torch.cat((gate_NH, up_NH), -1))
        return glu(module, torch.stack((gate_NH, up_NH), -1).flatten(-2))

    return of(torch.ones_like(gate_NH)) - of(torch.zeros_like(gate_NH))


def _hook_llama4(name: str, moe: Any) -> HookedExperts:
    """Llama-4 computes every expert for every token and scales their inputs, most of them by 0: compute chosen ones only."""
    routed = moe.experts
    # What the decorator of the other classes sets.
    routed.is_concatenated = routed.has_gate = routed.is_transposed = True
    routed.has_bias = routed.has_post_expert_norm = routed._is_expert_parallel = False

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_ND = hidden_states.reshape(-1, self.hidden_dim)
        scores_NE, logits_NE = self.router(x_ND)  # sigmoids of the chosen experts, 0 elsewhere
        index_Nk = logits_NE.topk(self.top_k, dim=-1).indices
        scaled = (x_ND[:, None] * scores_NE.gather(1, index_Nk)[..., None].to(x_ND.dtype)).flatten(0, 1)
        out = routed(scaled, index_Nk.reshape(-1, 1), torch.ones_like(scaled[:, :1]))
        return self.shared_expert(x_ND) + out.view(len(x_ND), self.top_k, -1).sum(1), logits_NE

    moe.forward = types.MethodType(forward, moe)
    return _hook_routed(name, routed)


GLUS = (
    ("gate_proj", "down_proj"),
    ("w1", "w2"),
    ("gate_up_proj", "down_proj"),
    ("input_linear", "output_linear"),
)
"""Names of the linear layers of a GLU: of the gate, alone or above the up projection, and of the down projection."""
ACTIVATIONS = ("act_fn", "activation_fn", "activation", "act")
"""Names of its activation."""


def _glu_of(module: nn.Module) -> tuple[Any, Any, Any] | None:
    """The gate projection, the activation and the down projection of a GLU; None for other modules."""
    act = next((found for name in ACTIVATIONS if callable(found := getattr(module, name, None))), None)
    for gate_name, down_name in GLUS:
        gate, down = getattr(module, gate_name, None), getattr(module, down_name, None)
        if act is None or not isinstance(gate, nn.Linear) or not isinstance(down, nn.Linear):
            continue
        if gate.out_features in (down.in_features, 2 * down.in_features):
            return gate, act, down
    return None


def _hook_glu(name: str, module: nn.Module, part: str, linears: tuple[Any, Any, Any]) -> HookedExperts:
    gate, act, down = linears
    experts = HookedExperts(name, part, 1, down.in_features)
    gates: list[torch.Tensor] = []

    def remember(_: Any, __: Any, out: torch.Tensor) -> None:
        gates[:] = [out[..., : experts.neurons]]

    def select(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        hidden = inputs[0]
        gate_NH = gates.pop().reshape(-1, experts.neurons)
        rows = Rows(gate_NH, act(gate_NH), hidden.reshape(-1, experts.neurons), None)
        return experts.select(rows).view_as(hidden)

    gate.register_forward_hook(remember)
    down.register_forward_pre_hook(select)
    return experts
