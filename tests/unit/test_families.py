"""config.json of Hugging Face models: which fields become which of ours, and which are refused, by name."""

import copy
from typing import Any

import pytest
import transformers

from mone_model.config import ModelConfig
from mone_model.hf.families import FAMILIES, UnknownModel, read_family

BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
QWEN = BASE | {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "head_dim": 32,
    "norm_topk_prob": True,
    "rope_theta": 1000000.0,
}
MIXTRAL = BASE | {"model_type": "mixtral", "intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 2}
OLMOE = BASE | {"model_type": "olmoe", "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
LLAMA = BASE | {"model_type": "llama", "intermediate_size": 96, "tie_word_embeddings": True}
MONE = BASE | {"model_type": "mone", "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
CLASSES: dict[str, Any] = {
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "mixtral": transformers.MixtralConfig,
    "olmoe": transformers.OlmoeConfig,
    "llama": transformers.LlamaConfig,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QWEN, {"num_experts": 8, "router_topk": 2, "moe_ffn_hidden_size": 32, "kv_channels": 32, "rotary_base": 1000000}),
        (QWEN, {"qk_layernorm": True, "router_pre_softmax": False, "shared_expert_ffn_hidden_size": 0, "vocab_size": 320}),
        (QWEN | {"norm_topk_prob": False}, {"router_pre_softmax": True}),
        (QWEN | {"num_experts": None, "num_local_experts": 8}, {"num_experts": 8}),
        (QWEN | {"sliding_window": 4, "use_sliding_window": False}, {"seq_length": 256}),
        (QWEN | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, {"rotary_base": 5000}),
        (QWEN | {"rope_scaling": {"type": "default"}}, {"rotary_base": 1000000}),
        (QWEN | {"hidden_act": "relu2"}, {"activation": "relu_squared"}),
        (MIXTRAL, {"qk_layernorm": False, "router_pre_softmax": False, "rotary_base": 1000000, "num_query_groups": 2}),
        (MIXTRAL | {"router_jitter_noise": 0.1, "sliding_window": 256}, {"num_experts": 8}),
        (OLMOE, {"qk_layernorm": True, "qk_layernorm_scope": "projection", "router_pre_softmax": True}),
        (LLAMA, {"num_experts": 1, "router_topk": 1, "router_pre_softmax": True, "aux_loss_coeff": 0.0}),
        (LLAMA, {"moe_ffn_hidden_size": 96, "tie_embeddings": True, "kv_channels": None, "num_query_groups": 2}),
        (LLAMA | {"num_key_value_heads": 4}, {"num_query_groups": None}),
        (MONE | {"activation_ratio": 0.25, "norm_topk_prob": True}, {"activation_ratio": 0.25, "router_pre_softmax": False}),
        (
            MONE
            | {"scoring_func": "sigmoid", "norm_topk_prob": True, "use_expert_bias": True, "routed_scaling_factor": 2.5},
            {"router_score_function": "sigmoid", "expert_bias": True, "router_scaling_factor": 2.5},
        ),
        (MONE | {"shared_expert_intermediate_size": 48, "qk_layernorm": False}, {"shared_expert_ffn_hidden_size": 48}),
    ],
)
def test_fields_become_ours(config: dict[str, Any], expected: dict[str, Any]) -> None:
    model = read_family(config)[1]
    assert {name: getattr(model, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type='gpt2': known families are mone, qwen3_moe, mixtral, olmoe, llama"]),
        ({}, ["model_type=None"]),
        (QWEN | {"attention_bias": True}, ["attention_bias=True: our projections have no bias"]),
        (QWEN | {"sliding_window": 64, "use_sliding_window": True}, ["sliding_window=64", "at most 64"]),
        (MIXTRAL | {"sliding_window": 64}, ["sliding_window=64"]),
        ({**LLAMA, "model_type": "mistral", "max_position_embeddings": 8192}, ["sliding_window=4096"]),
        (QWEN | {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        (QWEN | {"mlp_only_layers": [0]}, ["mlp_only_layers=[0]"]),
        (QWEN | {"decoder_sparse_step": 2}, ["decoder_sparse_step=2"]),
        (QWEN | {"rope_scaling": {"rope_type": "yarn", "factor": 4}}, ["rope_type='yarn'"]),
        (QWEN | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        (LLAMA | {"rope_theta": 10000.5}, ["rope_theta=10000.5: must be a whole number"]),
        (LLAMA | {"quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
        (LLAMA | {"mlp_bias": True, "hidden_act": "gelu_new"}, ["mlp_bias=True", "hidden_act='gelu_new'"]),
        (OLMOE | {"clip_qkv": 8.0}, ["clip_qkv=8.0"]),
        (QWEN | {"num_experts_per_tok": 1}, ["num_experts_per_tok=1 with normalised weights"]),
        (QWEN | {"num_experts": 8, "num_local_experts": 4}, ["num_experts=8 and num_local_experts=4 differ"]),
        ({**QWEN, "num_experts": None}, ["num_experts or num_local_experts is missing"]),
        (LLAMA | {"hidden_size": "64"}, ["hidden_size='64': must be a positive integer"]),
        (LLAMA | {"hidden_size": 100, "num_attention_heads": 10}, ["model.hidden_size=100: must be a multiple of 8"]),
        (MONE | {"neuron_thresholds": [0.1, 0.2]}, ["neuron_thresholds=[0.1, 0.2]: training keeps the K best"]),
        (MONE | {"scoring_func": "sigmoid", "norm_topk_prob": False}, ["norm_topk_prob=False: sigmoid"]),
    ],
)
def test_what_ours_cannot_express_is_named(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnknownModel) as error:
        read_family(config)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_all_problems_are_in_one_list() -> None:
    wrong = QWEN | {
        "attention_bias": True,
        "mlp_only_layers": [1],
        "rope_scaling": {"rope_type": "linear"},
        "hidden_size": 0,
    }
    with pytest.raises(UnknownModel) as error:
        read_family(wrong)
    assert str(error.value).count(";") == 3


@pytest.mark.parametrize("family", CLASSES)
def test_a_missing_field_means_what_it_means_in_transformers(family: str) -> None:
    """The defaults of the classes; a file that lacks them is read the same as one that spells them out."""
    whole = CLASSES[family](**{name: value for name, value in BASE.items() if name != "rms_norm_eps"}).to_dict()
    if family == "mistral":
        whole |= {"sliding_window": None, "max_position_embeddings": 256}
    model = read_family(whole)[1]
    stated = {"model_type", "max_position_embeddings", "intermediate_size", "moe_intermediate_size", "num_experts"}
    stated |= {
        "num_local_experts",
        "num_experts_per_tok",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "sliding_window",
    }
    short = {name: value for name, value in whole.items() if name in stated | {"num_attention_heads", "num_key_value_heads"}}
    assert whole["rms_norm_eps"] != 1e-5 or family in ("mixtral", "olmoe")
    if family in ("llama", "mistral"):  # the class computes it from the sizes
        assert whole["head_dim"] == model.head_size
    assert vars(read_family(short)[1]) | {"kv_channels": None} == vars(model) | {"kv_channels": None}


def test_the_configuration_is_not_changed() -> None:
    config = copy.deepcopy(QWEN)
    read_family(config)
    assert config == QWEN
    assert isinstance(read_family(config)[1], ModelConfig)
    assert FAMILIES["qwen3_moe"].names[0] == "qwen3_moe"
