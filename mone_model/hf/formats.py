"""The formats of an exported model: which ones express it exactly, and the config.json of each.

    obstacles = why_not(model, "mixtral")        # [] if it is exact
    choose_format(model)                         # "qwen3_moe", "mixtral", "granitemoeshared", "glm4_moe" or "mone"
    config = config_of(model, "mone", end=0, dtype="float32")    # the fields of config.json

A native class cannot select neurons: a model below `activation_ratio=1` is always a `mone`.
"""

from collections.abc import Sequence
from typing import Any

from mone_model.config import ModelConfig
from mone_model.hf.families import ACTIVATIONS

NAMES_OF_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "swish"}
"""Names of gate activations in transformers."""

CLASSES = {
    "mone": "MoneForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
"""Class of each format."""

AUTO_MAP = {
    "AutoConfig": "configuration_mone.MoneConfig",
    "AutoModel": "modeling_mone.MoneModel",
    "AutoModelForCausalLM": "modeling_mone.MoneForCausalLM",
}
"""Where transformers finds the classes of `mone` in the exported folder."""


def choose_format(model: ModelConfig, thresholds_L: Sequence[float] | None = None) -> str:
    """The first native format that expresses the model exactly, or else `mone`."""
    native = (name for name in CLASSES if name != "mone" and not why_not(model, name, thresholds_L))
    return next(native, "mone")


def why_not(model: ModelConfig, format: str, thresholds_L: Sequence[float] | None = None) -> list[str]:
    """The options of the model that a format cannot express, each with its value and what the format needs."""
    needs: list[tuple[str, bool, str]] = [
        ("expert_capacity_factor", model.expert_capacity_factor is None, "null: it drops no tokens"),
    ]
    if format != "mone":
        needs += [
            ("activation_ratio", model.activation_ratio == 1, "1: it keeps all neurons"),
            ("neuron_bias", not model.neuron_bias, "false: it keeps all neurons"),
            ("neuron_score", model.neuron_score == "abs_gate", "abs_gate: it keeps all neurons"),
            ("shared_expert_neuron_ratio", model.shared_expert_neuron_ratio == 1, "1: it keeps all neurons"),
            ("activation", model.activation == "silu", "silu: engines assume it"),
            ("qk_layernorm_scope", not model.qk_layernorm or model.qk_layernorm_scope == "head", "head"),
        ]
    shared, factor = model.shared_expert_ffn_hidden_size, model.router_scaling_factor
    softmax, later = model.router_score_function == "softmax", not model.router_pre_softmax
    if format == "qwen3_moe":
        needs += [
            ("shared_expert_ffn_hidden_size", shared == 0, "0"),
            ("qk_layernorm", model.qk_layernorm, "true"),
            ("router_score_function", softmax, "softmax"),
            ("router_scaling_factor", factor in (None, 1), "null"),
        ]
    elif format in ("mixtral", "granitemoeshared"):
        heads = model.head_size * model.num_attention_heads == model.hidden_size
        plain = format == "mixtral"
        needs += [
            ("qk_layernorm", not model.qk_layernorm, "false"),
            ("router_score_function", softmax, "softmax"),
            ("router_pre_softmax", later, "false"),
            ("router_scaling_factor", factor in (None, 1), "null"),
            ("shared_expert_ffn_hidden_size", (shared == 0) == plain, "0" if plain else "positive"),
            ("kv_channels", heads or plain, "hidden_size / num_attention_heads"),
        ]
    elif format == "glm4_moe":
        multiple = shared > 0 and shared % model.moe_ffn_hidden_size == 0
        needs += [
            ("shared_expert_ffn_hidden_size", multiple, f"a multiple of moe_ffn_hidden_size={model.moe_ffn_hidden_size}"),
            ("qk_layernorm", model.qk_layernorm, "true"),
            ("router_score_function", not softmax, "sigmoid"),
            ("router_topk", model.router_topk > 1, "above 1: it divides the weights by their sum"),
        ]
    found = [f"model.{name}={getattr(model, name)} (must be {right})" for name, holds, right in needs if not holds]
    if thresholds_L is not None and format != "mone":
        found.append("thresholds (must be null: it keeps all neurons)")
    elif thresholds_L is not None and len(thresholds_L) != model.num_layers:
        found.append(f"thresholds of {len(thresholds_L)} layers (must be model.num_layers={model.num_layers})")
    return found


def config_of(
    model: ModelConfig, format: str, *, end: int | None, dtype: str, thresholds_L: Sequence[float] | None = None
) -> dict[str, Any]:
    """The fields of config.json; end: the token that ends a document; dtype: of the weights, such as float32."""
    assert not why_not(model, format, thresholds_L), "the caller refuses what the format cannot express"
    heads = model.num_attention_heads
    normalised = not model.router_pre_softmax if model.router_score_function == "softmax" else model.router_topk > 1
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    config: dict[str, Any] = {
        "architectures": [CLASSES[format]],
        "model_type": format,
        "dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.num_query_groups or heads,
        "head_dim": model.head_size,
        "hidden_act": NAMES_OF_ACTIVATIONS[model.activation],
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "rope_parameters": rope,
        "initializer_range": model.init_std,
        "attention_bias": False,
        "attention_dropout": model.attention_dropout,
        "num_experts_per_tok": model.router_topk,
        "router_aux_loss_coef": model.aux_loss_coeff,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
        "use_cache": True,
    }
    experts = {"num_experts": model.num_experts, "moe_intermediate_size": model.moe_ffn_hidden_size}
    if format == "qwen3_moe":
        config |= experts | {"norm_topk_prob": normalised, "intermediate_size": model.moe_ffn_hidden_size}
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    elif format in ("mixtral", "granitemoeshared"):
        config |= {"num_local_experts": model.num_experts, "intermediate_size": model.moe_ffn_hidden_size}
        if format == "granitemoeshared":
            config |= {
                "shared_intermediate_size": model.shared_expert_ffn_hidden_size,
                "attention_multiplier": model.head_size**-0.5,
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
            }
    elif format == "glm4_moe":
        config |= {
            "n_routed_experts": model.num_experts,
            "n_shared_experts": model.shared_expert_ffn_hidden_size // model.moe_ffn_hidden_size,
            "moe_intermediate_size": model.moe_ffn_hidden_size,
            "intermediate_size": model.moe_ffn_hidden_size,
            "first_k_dense_replace": 0,
            "num_nextn_predict_layers": 0,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": model.router_scaling_factor or 1.0,
        }
        rope["partial_rotary_factor"] = 1.0
    else:
        config |= experts | {
            "auto_map": AUTO_MAP,
            "norm_topk_prob": normalised,
            "qk_layernorm": model.qk_layernorm,
            "qk_layernorm_scope": model.qk_layernorm_scope,
            "activation_ratio": model.activation_ratio,
            "layer_activation_ratios": model.layer_activation_ratios,
            "neuron_thresholds": None if thresholds_L is None else list(thresholds_L),
            "shared_expert_intermediate_size": model.shared_expert_ffn_hidden_size,
            "shared_expert_neuron_ratio": model.shared_expert_neuron_ratio,
            "scoring_func": model.router_score_function,
            "use_expert_bias": model.expert_bias,
            "use_neuron_bias": model.neuron_bias,
            "neuron_score": model.neuron_score,
            "routed_scaling_factor": model.router_scaling_factor or 1.0,
        }
    return config
