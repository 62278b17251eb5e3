"""Module specs: Megatron-Core's transformer with our experts and router, by local or Transformer Engine layers."""

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from mone_model.config import ComputeConfig, ModelConfig, top_k
from mone_model.megatron import versions
from mone_model.megatron.attention import CoreAttention
from mone_model.megatron.experts import NeuronExperts, SharedNeuronExpert
from mone_model.megatron.norms import KeyNorm, QueryNorm, RMSNorm
from mone_model.megatron.router import Router
from mone_model.megatron.transformer_engine import uses_transformer_engine
from mone_model.neuron_balance import Balance


def block_spec(
    model: ModelConfig, compute: ComputeConfig, config: TransformerConfig, *, backend: str, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The transformer layers of this pipeline stage and their final norm; backend: the experts' (`expert_backends`)."""
    if uses_transformer_engine(compute):
        layer = get_gpt_layer_with_transformer_engine_spec(num_experts=model.num_experts, qk_layernorm=config.qk_layernorm)
        from megatron.core.extensions.transformer_engine import TENorm as final_norm
    else:
        layer = get_gpt_layer_local_spec(
            num_experts=model.num_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        final_norm = RMSNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CoreAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        # Use the names of Transformer Engine's layers in checkpoints, where the norm before the experts is a module.
        layer.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    if model.qk_layernorm and model.qk_layernorm_scope == "projection":
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm
    moe: MoESubmodules = versions.submodules_of(layer.submodules.mlp)
    moe.router = Router
    moe.experts = versions.moe_part(
        NeuronExperts,
        active_neurons=model.active_neurons,
        activation=model.activation,
        balance_coeff=model.neuron_balance_coeff,
        balance=Balance(model.neuron_balance_form, model.neuron_balance_stride),
        bias_rate=model.neuron_bias_update_rate if model.neuron_bias else None,
        score=model.neuron_score,
        backend=backend,
    )
    if model.shared_expert_neuron_ratio < 1:
        k = top_k(model.shared_expert_neuron_ratio, model.shared_expert_ffn_hidden_size)
        moe.shared_experts = versions.moe_part(
            SharedNeuronExpert,
            submodules=versions.submodules_of(moe.shared_experts),
            active_neurons=k,
            activation=model.activation,
        )
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=final_norm)
