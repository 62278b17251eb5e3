"""Mixture of Neuron Experts (arXiv 2510.05781) in transformers: Qwen3-MoE's attention with experts that select neurons.

    y = sum over chosen experts i of  p_i(x) * sum over kept neurons j of  G_ij(x) (w_up_ij . x) w_down_ij
    G_i(x) = act(W_gate_i x)

A token keeps, in each of its experts, the K neurons with the largest |G|, plus a bias if the model has one; among equals the
lower index is kept.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import use_experts_implementation
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeExperts,
    Qwen3MoeForCausalLM,
    Qwen3MoeMLP,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
    Qwen3MoeTopKRouter,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_mone import MoneConfig, top_k

ENGINES = {"vllm.model_executor": "mone_model.vllm.method", "sglang.srt": "mone_model.sglang"}
"""Engines that replace the experts by their own, and the modules of our plugins for them, which keep the selection."""


def check_engine(config: MoneConfig) -> None:
    """RuntimeError in an engine whose own experts would silently compute all neurons with SiLU."""
    plain = config.activation_ratio == 1 and config.neuron_thresholds is None and config.hidden_act == "silu"
    for engine, plugin in ENGINES.items():
        if not plain and engine in sys.modules and plugin not in sys.modules:
            name = engine.split(".")[0]
            raise RuntimeError(
                f"{name} replaces the experts of this model by its own, which compute all neurons with SiLU: the results "
                f"would be wrong. Load this project's plugin ({plugin}) first, or use transformers without {name}."
            )


def select_neurons(
    active: torch.Tensor,
    k: int,
    threshold: float | None = None,
    bias: torch.Tensor | None = None,
    score: torch.Tensor | None = None,
) -> torch.Tensor:
    """Whether each neuron [..., H] is kept: the k with the largest |active| + bias, or those that reach the threshold.

    score: [..., H] in place of |active| + bias.
    """
    if score is None:
        score = active.detach().abs() if bias is None else active.detach().abs() + bias
    # NaN counts as infinity, so that exactly k are kept.
    score = score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if threshold is not None:
        return score >= threshold
    smallest = score.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = score > smallest, score == smallest
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def keep_neurons(
    active: torch.Tensor,
    k: int,
    threshold: float | None = None,
    bias: torch.Tensor | None = None,
    score: torch.Tensor | None = None,
) -> torch.Tensor:
    """Zero the neurons [..., H] that are not kept."""
    if threshold is None and k >= active.size(-1):
        return active
    return active.masked_fill(~select_neurons(active, k, threshold, bias, score), 0)


def score_neurons(name: str, gate: torch.Tensor, active: torch.Tensor, up: torch.Tensor) -> torch.Tensor | None:
    """Scores [..., H] by which neurons are kept, other than |active|. gate: before the activation; active: after it."""
    gate, active, up = gate.detach(), active.detach(), up.detach()
    if name == "gate":
        return active
    if name == "abs_gate_up":
        return (active * up).abs()
    if name == "preactivation":
        return gate.abs()
    if name in ("random", "random_in_training"):
        return torch.rand_like(active)
    return None


def frozen_projection(expert: int, neurons: int, width: int) -> torch.Tensor:
    """[H, D] the fixed random matrix R of an expert: with neuron_score="frozen", |R x| is the score."""
    return torch.randn(neurons, width, generator=torch.Generator().manual_seed(251005781 + expert)) / width**0.5


@use_experts_implementation
class MoneExperts(Qwen3MoeExperts):
    """The routed experts of a layer."""

    def __init__(self, config: MoneConfig, layer_idx: int):
        super().__init__(config)
        self.activation = config.hidden_act
        self.k = config.active_neurons_of(layer_idx)
        self.threshold = None if config.neuron_thresholds is None else config.neuron_thresholds[layer_idx]
        # A parameter without a gradient, so that it is loaded, saved and moved as the weights are.
        bias = torch.zeros(config.num_experts, config.moe_intermediate_size) if config.use_neuron_bias else None
        self.neuron_bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.chosen: torch.Tensor | None = None
        """[N, k] the experts of the tokens, if there is a bias."""
        self.score = config.neuron_score
        self.frozen: torch.Tensor | None = None
        """[E, H, D] the `frozen_projection` of each expert, from the first use on."""

    def _apply_gate(
        self, gate_up: torch.Tensor, bias: torch.Tensor | None = None, score: torch.Tensor | None = None
    ) -> torch.Tensor:
        # Every implementation of transformers calls this, except Qwen3-MoE's own forward.
        gate, up = gate_up.float().chunk(2, dim=-1)
        active = self.act_fn(gate)
        if self.keeps_all_scaled:
            return (active * up * (self.k / active.size(-1))).to(gate_up.dtype)
        if self.neuron_bias is not None and bias is None:
            bias = self.neuron_bias[self._experts_of_rows()]
        if self.score == "frozen" and score is None:
            name = self.config._experts_implementation
            raise ValueError(f"experts_implementation={name!r}: neuron_score='frozen' needs eager or mone")
        if score is None:
            score = score_neurons(self.score, gate, active, up)
        return (keep_neurons(active, self.k, self.threshold, bias, score) * up).to(gate_up.dtype)

    @property
    def keeps_all_scaled(self) -> bool:
        """Whether all neurons are kept and their outputs multiplied by K / H: random_in_training outside of training."""
        return self.score == "random_in_training" and not self.training and self.threshold is None

    def frozen_projections(self) -> torch.Tensor:
        """[E, H, D] the matrices of neuron_score="frozen", on the device and in the type of the weights."""
        weight = self.gate_up_proj
        if self.frozen is None or self.frozen.device != weight.device or self.frozen.dtype != weight.dtype:
            neurons, width = weight.size(1) // 2, weight.size(2)
            each = [frozen_projection(expert, neurons, width) for expert in range(self.num_experts)]
            self.frozen = torch.stack(each).to(weight)
        return self.frozen

    def _experts_of_rows(self) -> torch.Tensor:
        """[N * k] the expert of each row that an implementation of transformers hands to `_apply_gate`."""
        name = self.config._experts_implementation
        if name not in ("batched_mm", "grouped_mm"):
            raise ValueError(f"experts_implementation={name!r}: use_neuron_bias needs eager, batched_mm, grouped_mm or mone")
        assert self.chosen is not None
        experts = self.chosen.flatten()
        if name == "grouped_mm":  # sorts the rows
            experts = experts.sort().values
        return experts.clamp(max=self.num_experts - 1)  # under expert parallelism: an expert of another rank

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """`experts_implementation="eager"`: [N, D], [N, k] and [N, k] -> [N, D]."""
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert == self.num_experts:  # under expert parallelism: an expert of another rank
                continue
            token, slot = torch.where(top_k_index == expert)
            x = hidden_states[token]
            bias = None if self.neuron_bias is None else self.neuron_bias[expert]
            frozen = F.linear(x, self.frozen_projections()[expert]).detach() if self.score == "frozen" else None
            score = None if frozen is None else frozen.float().abs()
            hidden = self._apply_gate(F.linear(x, self.gate_up_proj[expert]), bias, score)
            y = F.linear(hidden, self.down_proj[expert]) * top_k_weights[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def choose_experts(logits, bias, config: MoneConfig):
    """Router logits [N, E] fp32 and bias [E] or None -> routing weights [N, k] fp32, experts [N, k]."""
    sigmoid = config.scoring_func == "sigmoid"
    softmax_later = config.norm_topk_prob and not sigmoid
    scores = logits if softmax_later else logits.sigmoid() if sigmoid else logits.softmax(-1)
    biased = scores if bias is None else scores + bias.float()
    experts = biased.topk(config.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(-1, experts)
    if softmax_later:  # of the chosen logits: the same as normalised probabilities
        weights = weights.softmax(-1)
    elif config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor, experts


class MoneTopKRouter(Qwen3MoeTopKRouter):
    """Chooses the experts of each token, in fp32."""

    def __init__(self, config: MoneConfig):
        super().__init__(config)
        self.config = config
        # A parameter without a gradient, so that it is loaded, saved and moved as the weights are.
        bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False) if config.use_expert_bias else None
        self.e_score_correction_bias = bias

    def forward(self, hidden_states):
        """[N, D] -> logits [N, E], routing weights [N, k], experts [N, k]."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        logits = F.linear(hidden_states.float(), self.weight.float())
        weights, experts = choose_experts(logits, self.e_score_correction_bias, self.config)
        return logits, weights.to(hidden_states.dtype), experts


class MoneSharedExpert(Qwen3MoeMLP):
    """The expert of every token, with a selection of its own."""

    def __init__(self, config: MoneConfig):
        super().__init__(config, intermediate_size=config.shared_expert_intermediate_size)
        self.k = top_k(config.shared_expert_neuron_ratio, self.intermediate_size)

    def forward(self, x):
        """[..., D] -> [..., D]."""
        active = keep_neurons(self.act_fn(self.gate_proj(x).float()), self.k)
        return self.down_proj((active * self.up_proj(x).float()).to(x.dtype))


class MoneSparseMoeBlock(nn.Module):
    """Router, routed experts and shared expert of a layer."""

    def __init__(self, config: MoneConfig, layer_idx: int):
        super().__init__()
        self.experts = MoneExperts(config, layer_idx)
        self.gate = MoneTopKRouter(config)
        self.shared_expert = None
        if config.shared_expert_intermediate_size:
            # Without a selection it is the plain class, whose projections inference engines can fuse.
            plain = config.shared_expert_neuron_ratio == 1
            self.shared_expert = (
                Qwen3MoeMLP(config, intermediate_size=config.shared_expert_intermediate_size)
                if plain
                else MoneSharedExpert(config)
            )

    def forward(self, hidden_states):
        """[B, s, D] -> [B, s, D]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, experts = self.gate(x)
        if self.experts.neuron_bias is not None:
            self.experts.chosen = experts
        out = self.experts(x, experts, weights)
        if self.shared_expert is not None:
            out = out + self.shared_expert(x)
        return out.reshape(hidden_states.shape)


class MoneProjectionNorm(Qwen3MoeRMSNorm):
    """RMSNorm over all heads of a token together."""

    def forward(self, hidden_states):
        """[B, s, heads, c] -> [B, s, heads, c]."""
        return super().forward(hidden_states.flatten(-2)).view(hidden_states.shape)


class MoneDecoderLayer(Qwen3MoeDecoderLayer):
    """A transformer layer."""

    def __init__(self, config: MoneConfig, layer_idx: int):
        super(Qwen3MoeDecoderLayer, self).__init__()  # its own would build Qwen3-MoE's experts first
        self.self_attn = Qwen3MoeAttention(config, layer_idx)
        if not config.qk_layernorm:
            self.self_attn.q_norm = self.self_attn.k_norm = nn.Identity()
        elif config.qk_layernorm_scope == "projection":
            channels, eps = self.self_attn.head_dim, config.rms_norm_eps
            self.self_attn.q_norm = MoneProjectionNorm(config.num_attention_heads * channels, eps=eps)
            self.self_attn.k_norm = MoneProjectionNorm(config.num_key_value_heads * channels, eps=eps)
        self.mlp = MoneSparseMoeBlock(config, layer_idx)
        self.input_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_size = config.hidden_size


class MonePreTrainedModel(Qwen3MoePreTrainedModel):
    """What the classes share."""

    config_class = MoneConfig
    _no_split_modules = ["MoneDecoderLayer"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "neuron_bias"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(MoneTopKRouter, index=0),
        "hidden_states": MoneDecoderLayer,
        "attentions": Qwen3MoeAttention,
    }


class MoneModel(MonePreTrainedModel, Qwen3MoeModel):
    """The transformer without the output projection."""

    def __init__(self, config: MoneConfig):
        check_engine(config)
        super(Qwen3MoeModel, self).__init__(config)  # its own would build Qwen3-MoE's layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MoneDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = Qwen3MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3MoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MoneForCausalLM(MonePreTrainedModel, Qwen3MoeForCausalLM):
    """The language model."""

    def __init__(self, config: MoneConfig):
        super(Qwen3MoeForCausalLM, self).__init__(config)
        self.model = MoneModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()


__all__ = ["MoneForCausalLM", "MoneModel", "MonePreTrainedModel"]
