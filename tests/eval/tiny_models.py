"""Tiny random models of transformers, one of each family that the sparsification papers study, and others."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 320
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALL_HEADS = {"num_key_value_heads": 4}
TOP2 = {"num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
LINEAR = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
NARROW = {"moe_intermediate_size": 32}
YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 32}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # The models of arXiv 2510.05781 and arXiv 2605.08575.
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {
        "intermediate_size": 96, "num_experts": 8, "head_dim": 16, "norm_topk_prob": True, **TOP2, **NARROW}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"intermediate_size": 32, "num_local_experts": 8, **TOP2}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", {
        "intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1,
        "topk_method": "greedy", **ALL_HEADS, **TOP2, **NARROW, **MLA}),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {
        "intermediate_size": 32, "num_local_experts": 8, "embedding_multiplier": 12.0, "attention_multiplier": 0.0625,
        "residual_multiplier": 0.22, "logits_scaling": 6.0, "tie_word_embeddings": True, **TOP2}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"intermediate_size": 32, "num_experts": 8, **ALL_HEADS, **TOP2}),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {
        "intermediate_size": 32, "num_local_experts": 8, "head_dim": 16, "sliding_window": 8, "rope_parameters": YARN,
        **TOP2}),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {
        "num_experts": 8, "head_dim": 16, **TOP2, **NARROW, **SHARED, **LINEAR}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {
        "intermediate_size": 32, "intermediate_size_mlp": 96, "num_local_experts": 8, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2, "head_dim": 16, "attention_chunk_size": 64, "use_qk_norm": False}),
    # Others.
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {
        "intermediate_size": 96, "num_experts": 8, **TOP2, **NARROW, **SHARED}),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", {
        "intermediate_size": 96, "num_experts": 8, "head_dim": 16, **TOP2, **NARROW, **SHARED, **LINEAR}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        "intermediate_size": 96, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
        "topk_group": 1, **ALL_HEADS, **TOP2, **NARROW, **MLA}),
    # Dense models, whose layers are one expert each.
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"intermediate_size": 32}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"intermediate_size": 32}),
}  # fmt: skip
"""Class, class of the configuration, and options beside `COMMON`."""

MIXTURES = [name for name in FAMILIES if name not in ("llama", "phi3")]
TOKENS_BT = torch.randint(0, VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))


def build(family: str, *, seed: int = 0, **options: Any) -> Any:
    """A random model in evaluation mode, with weights large enough that neurons differ."""
    kind, config, its = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, kind)(getattr(transformers, config)(**COMMON | its | options)).eval().float()
    return randomize(model)


def randomize(model: Any) -> Any:
    """Draw all weights but those of norms."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.08)
            elif "bias" in name:
                weight.normal_(std=0.02)
    return model


def expert_classes() -> Iterator[tuple[str, type]]:
    """Family and class of all experts of transformers that have its interface for experts."""
    root = Path(str(transformers.__file__)).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        if "@use_experts_implementation" not in path.read_text():
            continue
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for kind in list(vars(module).values()):
            own = isinstance(kind, type) and kind.__module__ == module.__name__
            if own and hasattr(kind, "_apply_gate") and hasattr(kind.__init__, "__wrapped__"):
                yield path.parent.name, kind


def _filled(experts: Any) -> Any:
    torch.manual_seed(0)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    experts.config._experts_implementation = "grouped_mm"
    return experts


SMALL = {
    **dict.fromkeys(("hidden_size",), 32),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    "num_experts_per_tok": 2,
}


def build_experts(kind: type) -> Any:
    """Random experts of a class, with the first configuration of its family that fits."""
    module = sys.modules[kind.__module__.replace(".modeling_", ".configuration_")]
    kinds = [each for each in vars(module).values() if isinstance(each, type)]
    for config_kind in (each for each in kinds if issubclass(each, transformers.PreTrainedConfig)):
        config = config_kind()
        for name, value in SMALL.items():
            # Some configurations hold a list of sizes, or compute an attribute.
            with contextlib.suppress(Exception):
                setattr(config, name, [value] * 8 if isinstance(getattr(config, name), list) else value)
        # Some classes take the width as an argument, or the configuration of one layer.
        arguments: list[tuple[Any, ...]] = [(config,), (config, 16)]
        with contextlib.suppress(Exception):
            arguments.append((config.per_layer_config[0],))
        for its in arguments:
            with contextlib.suppress(Exception):
                return _filled(kind(*its))
    raise AssertionError(f"no configuration fits {kind.__name__}")
