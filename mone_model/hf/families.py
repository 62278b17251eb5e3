"""Our model from the config.json of a Hugging Face folder, or every field of it that our model cannot express.

    family, model = read_family(json.load(open("config.json")))      # UnknownModel names all such fields
    family.names                                                     # how its tensors can be called on disk

The import is exact: the same logits to rounding at `activation_ratio=1`. To add a family, write a `Family`;
tests/distributed/test_import.py compares each of them with transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mone_model.config import ModelConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    "sigmoid": "sigmoid",
}
"""Our names of transformers' activations."""
REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


class UnknownModel(ValueError):
    """A model that ours cannot express; the message lists why."""


@dataclass(frozen=True)
class Family:
    """A model_type, and how its configuration differs from that of others."""

    names: tuple[str, ...]
    """Names on disk, as keys of `weight_map.NAMES`: one of these."""
    experts: Callable[["Fields"], dict[str, Any]]
    """Fields of our model that concern experts and router."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """What a missing field means, where families differ."""
    qk_layernorm: bool = False
    qk_layernorm_scope: str = "head"


class Fields:
    """The fields of a config.json; collects the problems with them."""

    def __init__(self, config: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.config, self.defaults = config, defaults
        self.problems: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a field: that of the family if it is missing; `default` if there is none, or it is null."""
        value = self.config.get(name, self.defaults.get(name))
        return default if value is None else value

    def need(self, name: str, *aliases: str) -> Any:
        """The value of a field that must be there, as a positive integer; under one of several names."""
        found = {each: self.config[each] for each in (name, *aliases) if self.config.get(each) is not None}
        if not found:
            self.problems.append(f"{' or '.join((name, *aliases))} is missing")
        elif len(set(map(repr, found.values()))) > 1:
            self.problems.append(" and ".join(f"{each}={value}" for each, value in found.items()) + " differ")
        else:
            value = next(iter(found.values()))
            if type(value) is int and value > 0:
                return value
            self.problems.append(f"{next(iter(found))}={value!r}: must be a positive integer")
        return 1

    def refuse(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        """Note a problem unless the field is missing or has one of these values."""
        value = self.config.get(name)
        if value is not None and value not in allowed:
            self.problems.append(f"{name}={value!r}: {why}")


def read_family(config: dict[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and our model of a config.json; UnknownModel lists every field that our model cannot express.

    `max_position_embeddings` becomes seq_length, the longest context; train with a shorter one by `model.seq_length`. The
    coefficients of auxiliary losses are those of new models, and 0 for a model of one expert.
    """
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UnknownModel(f"model_type={kind!r}: known families are {', '.join(FAMILIES)}")
    fields = Fields(config, family.defaults)
    for name in REQUIRED:
        fields.need(name)
    _refuse_what_no_family_has(fields)
    model = _attention(fields) | {
        "qk_layernorm": family.qk_layernorm,
        "qk_layernorm_scope": family.qk_layernorm_scope,
        "shared_expert_ffn_hidden_size": 0,
        "activation_ratio": 1.0,
    }
    model |= family.experts(fields)
    built = None
    try:
        built = ModelConfig(**model)
    except (ValueError, TypeError) as error:
        if not fields.problems:  # with problems, its values are placeholders
            fields.problems.append(str(error))
    if fields.problems or built is None:
        raise UnknownModel(f"model_type={kind}: our model cannot express {'; '.join(fields.problems)}")
    return family, built


def _refuse_what_no_family_has(fields: Fields) -> None:
    for name in ("attention_bias", "mlp_bias", "qkv_bias", "bias", "use_bias"):
        fields.refuse(name, (False,), "our projections have no bias")
    fields.refuse("clip_qkv", (), "queries, keys and values are not clipped")
    fields.refuse("mlp_only_layers", ([],), "every layer has experts")
    fields.refuse("decoder_sparse_step", (1,), "every layer has experts")
    fields.refuse("partial_rotary_factor", (1, 1.0), "all channels of a head are rotated")
    fields.refuse("quantization_config", (), "weights are not quantized; dequantize them first")
    fields.refuse("pretraining_tp", (1,), "products are not sliced")
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list) or any(each != "full_attention" for each in kinds):
        fields.problems.append(f"layer_types={sorted(set(map(str, kinds)))}: every layer attends to all earlier tokens")
    window, longest = fields.get("sliding_window"), fields.get("max_position_embeddings")
    used = fields.get("use_sliding_window", True)
    if used and type(window) is int and type(longest) is int and window < longest:
        fields.problems.append(
            f"sliding_window={window}: attention has no window. With max_position_embeddings of at most {window} in "
            "config.json it is exact"
        )


def _attention(fields: Fields) -> dict[str, Any]:
    """Fields of our model that do not concern experts."""
    heads, width = fields.get("num_attention_heads", 1), fields.get("hidden_size", 1)
    activation = fields.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        fields.problems.append(f"hidden_act={activation!r}: choose from {', '.join(ACTIVATIONS)}")
    groups = fields.get("num_key_value_heads")
    return {
        "num_layers": fields.get("num_hidden_layers"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_query_groups": groups if groups != heads else None,
        "kv_channels": fields.get("head_dim"),
        "seq_length": fields.get("max_position_embeddings"),
        "vocab_size": fields.get("vocab_size"),
        "tie_embeddings": bool(fields.get("tie_word_embeddings", False)),
        "rotary_base": _rotary_base(fields),
        "norm_epsilon": fields.get("rms_norm_eps"),
        "init_std": fields.get("initializer_range", 0.02),
        "attention_dropout": fields.get("attention_dropout", 0.0),
        "activation": ACTIVATIONS.get(activation, "silu"),
    }


def _rotary_base(fields: Fields) -> int:
    """From `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of earlier versions."""
    scaling = fields.config.get("rope_parameters") or fields.config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        fields.problems.append(f"rope_parameters={scaling!r}: not a JSON object")
        scaling = {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        fields.problems.append(f"rope_type={kind!r}: must be default: positions are not scaled")
    partial = scaling.get("partial_rotary_factor", 1)
    if partial != 1:
        fields.problems.append(f"partial_rotary_factor={partial!r}: all channels of a head are rotated")
    base = scaling.get("rope_theta", fields.get("rope_theta", 10000.0))
    if not isinstance(base, int | float) or base != int(base):
        fields.problems.append(f"rope_theta={base!r}: must be a whole number")
        return 10000
    return int(base)


def _normalised(fields: Fields, *, normalised: bool) -> dict[str, Any]:
    """Softmax over the chosen experts after the top-k, or over all before it."""
    if normalised and fields.get("num_experts_per_tok") == 1:
        fields.problems.append("num_experts_per_tok=1 with normalised weights: every routing weight is 1")
        normalised = False
    return {"router_pre_softmax": not normalised}


def _routed(fields: Fields, width: str) -> dict[str, Any]:
    return {
        "num_experts": fields.need("num_experts", "num_local_experts"),
        "router_topk": fields.need("num_experts_per_tok"),
        "moe_ffn_hidden_size": fields.need(width),
    }


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    normalised = bool(fields.get("norm_topk_prob", False))
    return _routed(fields, "moe_intermediate_size") | _normalised(fields, normalised=normalised)


def _mixtral(fields: Fields) -> dict[str, Any]:
    # router_jitter_noise is for training only.
    return _routed(fields, "intermediate_size") | _normalised(fields, normalised=True)


def _olmoe(fields: Fields) -> dict[str, Any]:
    normalised = bool(fields.get("norm_topk_prob", False))
    return _routed(fields, "intermediate_size") | _normalised(fields, normalised=normalised)


def _dense(fields: Fields) -> dict[str, Any]:
    """One expert that every token chooses with weight 1."""
    return {
        "num_experts": 1,
        "router_topk": 1,
        "router_pre_softmax": True,
        "moe_ffn_hidden_size": fields.need("intermediate_size"),
        "aux_loss_coeff": 0.0,
    }


def _mone(fields: Fields) -> dict[str, Any]:
    """`mone_model.hf.configuration_mone.MoneConfig`."""
    fields.refuse("neuron_thresholds", (), "training keeps the K best neurons; set it to null in config.json")
    model = _routed(fields, "moe_intermediate_size")
    score, normalised = fields.get("scoring_func", "softmax"), bool(fields.get("norm_topk_prob", False))
    if score == "softmax":
        model |= _normalised(fields, normalised=normalised)
    elif normalised != (model["router_topk"] > 1):
        fields.problems.append(f"norm_topk_prob={normalised}: sigmoid scores of several experts are normalised, of one not")
    scale = fields.get("routed_scaling_factor", 1.0)
    return model | {
        "router_score_function": score,
        "router_scaling_factor": None if scale == 1 else scale,
        "expert_bias": bool(fields.get("use_expert_bias", False)),
        "neuron_bias": bool(fields.get("use_neuron_bias", False)),
        "neuron_score": fields.get("neuron_score", "abs_gate"),
        "qk_layernorm": bool(fields.get("qk_layernorm", True)),
        "qk_layernorm_scope": fields.get("qk_layernorm_scope", "head"),
        "activation_ratio": fields.get("activation_ratio", 1.0),
        "layer_activation_ratios": fields.get("layer_activation_ratios"),
        "shared_expert_ffn_hidden_size": fields.get("shared_expert_intermediate_size", 0),
        "shared_expert_neuron_ratio": fields.get("shared_expert_neuron_ratio", 1.0),
    }


SMALL = {"rms_norm_eps": 1e-6}
QWEN3_MOE = SMALL | {"num_key_value_heads": 4, "use_sliding_window": False}
MOE_NAMES = ("qwen3_moe", "mone", "mixtral")
FAMILIES = {
    "mone": Family(("mone",), _mone, QWEN3_MOE),
    "qwen3_moe": Family(MOE_NAMES, _qwen3_moe, QWEN3_MOE, qk_layernorm=True),
    "mixtral": Family(MOE_NAMES, _mixtral, {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8}),
    "olmoe": Family(MOE_NAMES, _olmoe, {"rms_norm_eps": 1e-5}, qk_layernorm=True, qk_layernorm_scope="projection"),
    "llama": Family(("dense",), _dense, SMALL),
    "qwen3": Family(
        ("dense",),
        _dense,
        SMALL | {"head_dim": 128, "num_key_value_heads": 32, "use_sliding_window": False},
        qk_layernorm=True,
    ),
    "mistral": Family(("dense",), _dense, SMALL | {"num_key_value_heads": 8, "sliding_window": 4096}),
}
"""By model_type. Defaults are those of the configuration classes of transformers."""
