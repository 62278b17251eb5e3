"""What the user wants of the experts, from vLLM's configuration.

    --additional-config '{"mone": {"thresholds": "study/thresholds.json", "ratio": 0.25}}'
    --hf-overrides '{"mone": {"ratio": 0.25}}'

    selection = read_selection(vllm_config.additional_config, vllm_config.model_config.hf_text_config)
    selection.rule(layer=3, neurons=768)           # TopK(192)

An exported MoNE model needs no options: its configuration has them.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mone_common.checks import check, is_number
from mone_common.threshold_file import read_threshold_file
from mone_model.expert_backends import Rule
from mone_model.hf.configuration_mone import top_k
from mone_model.hf.families import ACTIVATIONS
from mone_model.neuron_selection import TopK
from mone_model.thresholds import AtLeast

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "granitemoe")
"""Values of `model_type`, beside `mone`, whose experts the tests compare with transformers."""


@dataclass(frozen=True)
class Options:
    """The object `mone` of vLLM's additional configuration, or of its hf-overrides."""

    ratio: float | None = None
    """Share of an expert's neurons that a token keeps; with `thresholds`: which of them."""
    thresholds: str | None = None
    """Output file of mone-sparsify or mone-calibrate: select by thresholds in place of the K best."""
    many_rows: str = "select"
    """Above the row-count switch: `select` neurons too, or compute `all`, by vLLM's operator, from a copy of the weights."""
    quantized: str = "refuse"
    """Experts with quantized weights: `refuse` them, or compute them `dense`, by vLLM and with all neurons."""

    def __post_init__(self) -> None:
        check(self.ratio is None or (is_number(self.ratio) and 0 < self.ratio <= 1), "mone.ratio", self.ratio, _RATIO)
        is_path = self.thresholds is None or isinstance(self.thresholds, str)
        check(is_path, "mone.thresholds", self.thresholds, "must be the path of a file")
        check(self.many_rows in ("select", "all"), "mone.many_rows", self.many_rows, "choose select or all")
        check(self.quantized in ("refuse", "dense"), "mone.quantized", self.quantized, "choose refuse or dense")


_RATIO = "must be in (0, 1]"


@dataclass(frozen=True)
class Selection:
    """Which neurons the experts of a model keep."""

    ratio: float
    """Share of an expert's neurons: exactly, or on average if there are thresholds."""
    thresholds: dict[int, float] | None
    """By the number of the layer; None: the K best."""
    activation: str
    """Gate activation, a key of `mone_model.activations.ACTIVATIONS`."""
    trained: bool = False
    """Whether the model was trained with selection: its experts mean nothing without it."""
    many_rows: str = "select"
    """As in `Options`."""
    quantized: str = "refuse"
    """As in `Options`."""

    def rule(self, layer: int, neurons: int) -> Rule:
        """Which neurons a row keeps in the experts of a layer that have so many."""
        if self.thresholds is None:
            return TopK(top_k(self.ratio, neurons))
        return AtLeast(self.thresholds[layer])


def read_options(additional: Any, hf_config: Any) -> Options | None:
    """The object `mone`; None if there is none; ValueError for an unknown or invalid option."""
    found = [additional.get("mone") if isinstance(additional, dict) else None, getattr(hf_config, "mone", None)]
    check(None in found, "mone", found[0], "is in the additional configuration and in hf-overrides; leave one of them out")
    given = found[0] if found[1] is None else found[1]
    if given is None:
        return None
    check(isinstance(given, dict), "mone", given, 'must be an object, for example {"ratio": 0.25}')
    known = [field.name for field in fields(Options)]
    for name, value in given.items():
        check(name in known, f"mone.{name}", value, f"is not an option; known are {', '.join(known)}")
    return Options(**given)


def read_selection(additional: Any, hf_config: Any) -> Selection | None:
    """Which neurons the experts of this model keep; None: all, as vLLM computes them without the plugin.

    additional: vLLM's additional configuration. hf_config: the configuration of the model.
    Raises ValueError, before weights are loaded, for options that do not fit each other or the model.
    """
    options, kind = read_options(additional, hf_config), hf_config.model_type
    ours = kind == "mone"
    if options is None and not ours:
        return None
    known = ", ".join(("mone", *FAMILIES))
    check(ours or kind in FAMILIES, "model_type", kind, f"the option mone works for {known}; leave it out for this model")
    has_bias = ours and getattr(hf_config, "use_neuron_bias", False)
    check(not has_bias, "use_neuron_bias", True, "the plugin has no bias of neurons; use transformers for this model")
    score = getattr(hf_config, "neuron_score", "abs_gate") if ours else "abs_gate"
    check(score == "abs_gate", "neuron_score", score, "the plugin selects by abs_gate; use transformers for this model")
    name = hf_config.hidden_act
    check(name in ACTIVATIONS, "hidden_act", name, f"known activations are {', '.join(ACTIVATIONS)}")
    options = options or Options()
    ratio, thresholds = options.ratio, None
    if options.thresholds is not None:
        ratio, thresholds = _read_thresholds(options, hf_config)
    elif ours and ratio is None:
        ratio = hf_config.activation_ratio
        if hf_config.neuron_thresholds is not None:
            thresholds = dict(enumerate(hf_config.neuron_thresholds))
        layers = getattr(hf_config, "layer_activation_ratios", None)
        way_out = "the plugin keeps one share in all layers; give mone.ratio, or use transformers for this model"
        check(thresholds is not None or layers is None, "layer_activation_ratios", layers, way_out)
    if ratio is None:
        raise ValueError("mone.ratio=None: give the share of neurons to keep, or the thresholds of mone-sparsify")
    trained = ours and (hf_config.activation_ratio < 1 or hf_config.neuron_thresholds is not None)
    way_out = "this model was trained with selection; leave the option out"
    check(not trained or options.many_rows == "select", "mone.many_rows", options.many_rows, way_out)
    way_out = "vLLM's operator computes silu and gelu only; use select"
    has_stock = ACTIVATIONS[name] in ("silu", "gelu")
    check(has_stock or options.many_rows == "select", "mone.many_rows", options.many_rows, way_out)
    if ratio == 1 and thresholds is None and ACTIVATIONS[name] == "silu":
        return None
    return Selection(float(ratio), thresholds, ACTIVATIONS[name], trained, options.many_rows, options.quantized)


def _read_thresholds(options: Options, hf_config: Any) -> tuple[float, dict[int, float]]:
    """The ratio, and the thresholds by the number of the layer; ValueError if they are not of this model."""
    file = read_threshold_file(Path(str(options.thresholds)), ratio=options.ratio)
    kind, layers = hf_config.model_type, layers_with_experts(hf_config)
    return file.by_layer(options.ratio, option="mone.thresholds", model_type=kind, layers=layers)


def layers_with_experts(hf_config: Any) -> list[int]:
    """The numbers of the layers that have experts, by the fields of all families."""

    def get(name: str, default: Any) -> Any:
        value = getattr(hf_config, name, None)
        return default if value is None else value

    first, without = get("first_k_dense_replace", 0), get("mlp_only_layers", [])
    every, frequency = get("decoder_sparse_step", 1), get("moe_layer_freq", 1)
    layers = range(first, hf_config.num_hidden_layers)
    return [layer for layer in layers if layer not in without and (layer + 1) % every == 0 and layer % frequency == 0]
