"""The experts implementation `mone` of transformers: this project's backends compute the experts.

    model.set_experts_implementation("mone")         # a model of this project, after `import mone_model.hf`
    keep_neurons(model, ratio=0.25)                  # another MoE model, whose experts then keep a quarter of their neurons

On CPUs a few rows are computed by the backend `decode`, which reads the up and down weights of kept neurons only, and many
rows by `sparse` or a dense backend, whichever is faster here.

Shapes: N tokens, D width, H neurons of an expert, E experts.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from mone_common.checks import check
from mone_common.threshold_file import read_threshold_file
from mone_model.config import top_k
from mone_model.expert_backends import BACKENDS, Request, Rule, measure, measure_max_decode_rows, route
from mone_model.hf.families import ACTIVATIONS
from mone_model.hf.modeling_mone import MoneExperts
from mone_model.kernels.cpu import library
from mone_model.neuron_selection import TopK
from mone_model.thresholds import AtLeast


@dataclass(frozen=True)
class Selection:
    """What the experts of a layer compute."""

    rule: Rule
    k: int
    """Neurons that a row keeps, on average if the rule is a threshold."""
    activation: str
    """A key of `mone_model.activations.ACTIVATIONS`."""


def keep_neurons(model: Any, *, ratio: float | None = None, thresholds: str | Path | None = None) -> None:
    """Let every routed expert of a model keep a part of its neurons, computed by this project's backends.

    model: a mixture of experts of transformers whose experts have transformers' interface, such as Qwen3-MoE, Mixtral,
        OLMoE, DeepSeek-V2 and GraniteMoE, or a model of this project.
    ratio: share of an expert's neurons that a token keeps, by |act(gate)|; with `thresholds`, which of the file's ratios.
    thresholds: output file of mone-sparsify or mone-calibrate: keep the neurons that reach the threshold of their layer.

    Raises ValueError, before the model is changed, for experts that cannot be computed and for thresholds of another model.
    """
    check(ratio is None or 0 < ratio <= 1, "ratio", ratio, "must be in (0, 1]")
    check(ratio is not None or thresholds is not None, "ratio", ratio, "give a share of the neurons, or thresholds")
    layers = {_layer_of(name): module for name, module in model.named_modules() if hasattr(module, "_apply_gate")}
    check(bool(layers), "model", type(model).__name__, "has no experts with transformers' interface for experts")
    for module in layers.values():
        _check_computes(module)
    by_layer: dict[int, float] = {}
    if thresholds is not None:
        file, kind = read_threshold_file(Path(thresholds), ratio=ratio), model.config.get_text_config().model_type
        ratio, by_layer = file.by_layer(ratio, option="thresholds", model_type=kind, layers=sorted(layers))
    for layer, module in layers.items():
        k = top_k(float(ratio or 1), module.gate_up_proj.size(1) // 2)
        rule: Rule = AtLeast(by_layer[layer]) if by_layer else TopK(k)
        module.selection = Selection(rule, k, ACTIVATIONS[module.config.hidden_act])
    model.set_experts_implementation("mone")


def _layer_of(name: str) -> int:
    """The number of the layer of a module, such as 3 for model.layers.3.mlp.experts."""
    return int(next(part for part in name.split(".") if part.isdigit()))


def _check_computes(module: Any) -> None:
    """Raise ValueError unless the backends compute what these experts do."""
    ours = type(module).__name__ == MoneExperts.__name__  # by name, since trust_remote_code makes a class of its own
    stock = getattr(type(module), "_apply_gate", None) is _default_apply_gate
    plain = module.has_gate and module.is_concatenated and not (module.is_transposed or module.has_bias)
    known = ", ".join(ACTIVATIONS)
    act = getattr(module.config, "hidden_act", None)
    check(
        ours or (stock and plain), "model", type(module).__name__, "its experts are not down(act(gate) * up) without biases"
    )
    check(act in ACTIVATIONS, "hidden_act", act, f"known activations are {known}")


def _selection_of(module: Any) -> Selection:
    if (chosen := getattr(module, "selection", None)) is not None:
        return chosen
    if not hasattr(module, "k"):
        raise ValueError(f"{type(module).__name__}: call mone_model.hf.keep_neurons(model, ratio=...) to use `mone`")
    rule: Rule = TopK(module.k) if module.threshold is None else AtLeast(module.threshold)
    return Selection(rule, module.k, ACTIVATIONS[module.activation])


def compute_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[N, D], experts [N, k] and their weights [N, k] -> [N, D]; a registered function of transformers' ExpertsInterface."""
    selection = _selection_of(self)
    gate_up_E2HD = self.gate_up_proj.unflatten(1, (2, -1))
    down_EHD = _neuron_major(self.down_proj).transpose(1, 2)
    rule, score = selection.rule, getattr(self, "score", "abs_gate")
    if getattr(self, "keeps_all_scaled", False):
        top_k_weights, rule = top_k_weights * (selection.k / down_EHD.size(1)), TopK(down_EHD.size(1))
    request = Request(
        rule,
        selection.activation,
        score=score,
        frozen_EHD=self.frozen_projections() if score == "frozen" else None,
        bias_EH=getattr(self, "neuron_bias", None),
    )
    backend = BACKENDS[_choose(gate_up_E2HD, selection, top_k_index.numel(), score)]
    weights = backend.prepare(gate_up_E2HD, down_EHD)
    return route(backend, weights, hidden_states, top_k_index, top_k_weights, request)


def _neuron_major(down: torch.nn.Parameter) -> torch.nn.Parameter:
    """The same weights [E, D, H], once moved so that those of a neuron lie together in memory."""
    if not down.transpose(1, 2).is_contiguous():
        down.data = down.data.transpose(1, 2).contiguous().transpose(1, 2)
    return down


def _choose(gate_up_E2HD: torch.Tensor, selection: Selection, rows: int, score: str) -> str:
    """The name of the backend for so many rows."""
    if gate_up_E2HD.device.type != "cpu":
        return "grouped"
    experts, _, neurons, width = gate_up_E2HD.shape
    usable = score == "abs_gate" and width % library.WORD == 0 and library.usable(gate_up_E2HD, dtypes=library.DTYPES)
    kept = (selection.k, selection.activation, gate_up_E2HD.dtype)
    sparse = usable and gate_up_E2HD.dtype == torch.float32 and isinstance(selection.rule, TopK)
    many = measure(width, neurons, *kept, sparse=sparse).fastest
    if usable and not torch.is_grad_enabled() and 0 < rows <= _max_decode_rows(width, neurons, experts, *kept, many):
        return "decode"
    return many


_max_decode_rows = functools.cache(measure_max_decode_rows)

ALL_EXPERTS_FUNCTIONS.register("mone", compute_experts)
