"""Megatron-Core's TransformerConfig from ours.

config = transformer_config(ModelConfig(), ParallelConfig(expert=2), ComputeConfig())
"""

from typing import Any

from megatron.core.transformer import TransformerConfig

from mone_model.activations import ACTIVATIONS
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig


def transformer_config(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig) -> TransformerConfig:
    """Translate the three configurations."""
    losses = {
        "aux_loss": model.aux_loss_coeff,
        "seq_aux_loss": model.seq_aux_loss_coeff,
        "global_aux_loss": model.global_aux_loss_coeff,
    }
    balancing = {name: coeff for name, coeff in losses.items() if coeff > 0}
    recompute: dict[str, Any] = {}
    if compute.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": list(compute.recompute_modules)}
    elif compute.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    # Without expert parallelism, alltoall would sort and copy rows that are sorted. Only alltoall supports capacities.
    alone = parallel.expert * parallel.expert_tensor == 1 and model.expert_capacity_factor is None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_size,
        ffn_hidden_size=model.moe_ffn_hidden_size,
        # The norm over all heads is a module of ours (`norms.ProjectionNorm`).
        qk_layernorm=model.qk_layernorm and model.qk_layernorm_scope == "head",
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[model.activation].function,
        add_bias_linear=False,
        num_moe_experts=model.num_experts,
        moe_router_topk=model.router_topk,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.shared_expert_ffn_hidden_size or None,
        moe_router_score_function=model.router_score_function,
        moe_router_pre_softmax=model.router_pre_softmax,
        moe_router_topk_scaling_factor=model.router_scaling_factor,
        moe_router_load_balancing_type=list(balancing) or "none",
        moe_aux_loss_coeff=list(balancing.values()) or 0.0,
        moe_z_loss_coeff=model.z_loss_coeff or None,
        moe_router_enable_expert_bias=model.expert_bias,
        moe_router_bias_update_rate=model.expert_bias_update_rate,
        moe_expert_capacity_factor=model.expert_capacity_factor,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="allgather" if alone else compute.token_dispatcher,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        sequence_parallel=parallel.tensor > 1,
        # With virtual stages the default gives wrong results without an error (Megatron-Core 0.16.1 and 0.19.2).
        batch_p2p_comm=False,
        params_dtype=compute.dtype,
        bf16=compute.precision == "bf16",
        pipeline_dtype=compute.dtype,
        attention_softmax_in_fp32=True,
        # Megatron-Core's fused GELU is an approximation.
        bias_activation_fusion=model.activation == "silu",
        # Other fused forms need compiled extensions; Transformer Engine brings its own.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        moe_permute_fusion=False,
        persist_layer_norm=False,
        # initial_weights draws them again; without this first time the weights lack Megatron-Core's attributes.
        perform_initialization=True,
        use_cpu_initialization=False,
        **recompute,
    )
