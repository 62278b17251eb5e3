"""Exported MoNE models as a vLLM model: Qwen3-MoE's attention with the variants of this project, its router and experts.

Shapes: T tokens, D width, E experts, k experts of a token, S neurons of the shared expert, c head size, V vocabulary.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    split_tensor_along_last_dim,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeMLP,
    Qwen3MoeModel,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.platforms import current_platform

from mone_common.checks import check
from mone_model.expert_backends import Weights
from mone_model.hf.configuration_mone import MoneConfig, top_k
from mone_model.hf.families import ACTIVATIONS
from mone_model.hf.modeling_mone import choose_experts
from mone_model.neuron_selection import TopK
from mone_model.vllm.experts import make_served, rule_on_rank, serve


class MoneAttention(Qwen3MoeAttention):
    """Attention with RMSNorm over each head of queries and keys, over all heads together, or none."""

    def __init__(self, config: MoneConfig, vllm_config: Any, prefix: str) -> None:
        super().__init__(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            rope_parameters=config.rope_parameters,
            max_position_embeddings=config.max_position_embeddings,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        self.over_projection = config.qk_layernorm and config.qk_layernorm_scope == "projection"
        if not config.qk_layernorm:
            self.q_norm = self.k_norm = nn.Identity()
        elif self.over_projection:
            ranks = get_tensor_model_parallel_world_size()
            way_out = f"must divide the {self.total_num_kv_heads} heads of keys, whose norm is over all of them"
            check(self.total_num_kv_heads % ranks == 0, "tensor_parallel_size", ranks, way_out)
            self.q_norm = RMSNorm(self.total_num_heads * self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(self.total_num_kv_heads * self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T] and [T, D] -> [T, D]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        normalize = self._normalize_projection if self.over_projection else self._normalize_heads
        q, k = self.rotary_emb(positions, normalize(q, self.q_norm), normalize(k, self.k_norm))
        out, _ = self.o_proj(self.attn(q, k, v))
        return out

    def _normalize_heads(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """[T, heads * c], each head by itself."""
        return norm(x.unflatten(-1, (-1, self.head_dim))).view(x.shape)

    def _normalize_projection(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """[T, heads * c], over the heads of all ranks."""
        ranks = get_tensor_model_parallel_world_size()
        if ranks == 1:
            return norm(x)
        whole = norm(tensor_model_parallel_all_gather(x.contiguous()))
        return split_tensor_along_last_dim(whole, ranks)[get_tensor_model_parallel_rank()].contiguous()


class MoneSharedExpert(nn.Module):
    """The expert of every token, with a selection or an activation that vLLM's own does not have: a layer of one expert."""

    def __init__(self, config: MoneConfig, prefix: str) -> None:
        super().__init__()
        self.ranks, self.rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        neurons, width = config.shared_expert_intermediate_size, config.hidden_size
        way_out = f"must divide the {neurons} neurons of the shared expert"
        check(neurons % self.ranks == 0, "tensor_parallel_size", self.ranks, way_out)
        self.neurons = neurons // self.ranks
        ratio = config.shared_expert_neuron_ratio
        self.gate_up = nn.Parameter(torch.empty(1, 2, self.neurons, width), requires_grad=False)
        self.down = nn.Parameter(torch.empty(1, self.neurons, width), requires_grad=False)
        self.name = f"{prefix}.neurons"
        weights, kept = Weights(self.gate_up.data, self.down.data), top_k(ratio, self.neurons)
        served: Any
        if current_platform.is_cuda_alike():
            from mone_model.vllm.gpu_experts import SharedExpert

            way_out = "the K best neurons of a shared expert on several GPUs are not supported"
            check(self.ranks == 1 or ratio == 1, "tensor_parallel_size", self.ranks, way_out)
            served = SharedExpert(weights, TopK(kept), ACTIVATIONS[config.hidden_act])
        else:
            rule = rule_on_rank(TopK(top_k(ratio, neurons)), self.ranks)
            served = make_served(weights, rule, kept, ACTIVATIONS[config.hidden_act])
        get_current_vllm_config().compilation_config.static_forward_context[self.name] = served

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[str]:
        """This rank's neurons of [S, D], [S, D] and [D, S]; names as vLLM's mapper for Qwen3-MoE gives them."""
        own = slice(self.rank * self.neurons, (self.rank + 1) * self.neurons)
        for name, weight in weights:
            if name == "gate_up_proj.weight":
                half: int = weight.shard_id  # type: ignore[attr-defined]  # set by vLLM's mapper
                self.gate_up.data[0, half].copy_(weight[own])
                yield "gate_up"
            else:
                assert name == "down_proj.weight", name
                self.down.data[0].copy_(weight[:, own].T)
                yield "down"

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D], this rank's part of the sum."""
        first_T1 = x_TD.new_zeros(len(x_TD), 1, dtype=torch.int32)
        return serve(x_TD, first_T1, torch.ones_like(first_T1, dtype=torch.float32), self.name)


class MoneSparseMoeBlock(nn.Module):
    """Router, routed experts and shared expert of a layer."""

    def __init__(self, config: MoneConfig, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        # As in training, the router computes in fp32.
        self.gate = GateLinear(
            config.hidden_size, config.num_experts, out_dtype=torch.float32, force_fp32_compute=True, prefix=f"{prefix}.gate"
        )
        bias = None
        if config.use_expert_bias:
            bias = nn.Parameter(torch.zeros(config.num_experts, dtype=torch.float32), requires_grad=False)
        self.gate.e_score_correction_bias = bias
        self.shared_expert = None
        if config.shared_expert_intermediate_size:
            plain = config.shared_expert_neuron_ratio == 1 and config.hidden_act == "silu"
            self.shared_expert = (
                Qwen3MoeMLP(
                    config.hidden_size, config.shared_expert_intermediate_size, config.hidden_act,
                    quant_config=vllm_config.quant_config, reduce_results=False, prefix=f"{prefix}.shared_expert",
                )
                if plain
                else MoneSharedExpert(config, f"{prefix}.shared_expert")
            )  # fmt: skip
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            custom_routing_function=partial(_route, self.gate, config),
            quant_config=vllm_config.quant_config,
            shared_experts=self.shared_expert,
            prefix=f"{prefix}.experts",
            # The experts take the activation from the model's configuration: vLLM's for CPUs has not all of them.
            activation="silu",
        )

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        logits_TE, _ = self.gate(x_TD)
        return self.experts(hidden_states=x_TD, router_logits=logits_TE)


def _route(
    gate: Any, config: MoneConfig, hidden_states: Any, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A function that vLLM's router calls: router logits [T, E] -> routing weights and experts, [T, k] each."""
    weights_Tk, experts_Tk = choose_experts(gating_output.float(), gate.e_score_correction_bias, config)
    return weights_Tk, experts_Tk.int()


class MoneDecoderLayer(Qwen3MoeDecoderLayer):
    """A transformer layer."""

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)  # its own would build Qwen3-MoE's experts
        config = vllm_config.model_config.hf_text_config
        self.hidden_size = config.hidden_size
        self.self_attn = MoneAttention(config, vllm_config, f"{prefix}.self_attn")
        self.mlp = MoneSparseMoeBlock(config, vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class MoneForCausalLM(nn.Module, SupportsPP):
    """The language model."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_vllm_mapper = Qwen3MoeModel.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.config, self.quant_config = config, vllm_config.quant_config
        self.model = Qwen3MoeModel(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"), decoder_layer_type=MoneDecoderLayer
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=self.quant_config, prefix=maybe_prefix(prefix, "lm_head")
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, D]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Hidden states [T, D], before the output projection."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[T, D] -> [T, V]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the tensors of an exported folder; returns the names of the parameters that were set."""
        return AutoWeightsLoader(self).load_weights(weights)
