"""Configuration of a Mixture of Neuron Experts model in transformers.

    config = MoneConfig(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=512, activation_ratio=0.25)
    config.active_neurons        # 128

This file and `modeling_mone.py` need torch and transformers only. `mone-export` copies them beside the weights, so that the
model loads with `trust_remote_code=True` where MoNE is not installed.
"""

from transformers import Qwen3MoeConfig

NEURON_SCORES = ("abs_gate", "gate", "abs_gate_up", "preactivation", "random", "random_in_training", "frozen")


class MoneConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration, with the fields in which the models differ."""

    model_type = "mone"
    # Not the experts: a part of their neurons cannot choose the K best of all. Qwen3-MoE's plan would split them.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    activation_ratio: float = 1.0
    """Share of a routed expert's neurons that a token keeps: K = max(1, round(ratio * H)). 1 is a plain MoE."""
    layer_activation_ratios: list[float] | None = None
    """The share in each layer, if layers keep different shares; None: activation_ratio in all."""
    neuron_thresholds: list[float] | None = None
    """One for each layer: keep the neurons whose |act(gate)| is at least this, in place of the K best; None: the K best."""
    shared_expert_intermediate_size: int = 0
    """Neurons of the shared expert, which processes every token; 0: no shared expert."""
    shared_expert_neuron_ratio: float = 1.0
    """Share of the shared expert's neurons that a token keeps."""
    qk_layernorm: bool = True
    """RMSNorm on queries and keys."""
    qk_layernorm_scope: str = "head"
    """Over what this norm is taken: each head (head), or all heads of a token together (projection)."""
    scoring_func: str = "softmax"
    """Router scores: softmax or sigmoid."""
    use_expert_bias: bool = False
    """Whether the router adds a bias to its scores when it chooses experts (arXiv 2408.15664)."""
    use_neuron_bias: bool = False
    """Whether a bias is added to |act(gate)| when neurons are selected."""
    neuron_score: str = "abs_gate"
    """By which score neurons are kept: abs_gate, |act(gate)|; the others are controls of experiments (`score_neurons`)."""
    routed_scaling_factor: float = 1.0
    """Multiplies the routing weights."""

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.qk_layernorm_scope not in ("head", "projection"):
            raise ValueError(f"qk_layernorm_scope={self.qk_layernorm_scope!r}: choose head or projection")
        if self.qk_layernorm_scope == "projection":
            # A part of the heads cannot compute the norm: every rank computes all of them.
            self.base_model_tp_plan = {
                "layers.*.self_attn.q_proj": "colwise_gather_output",
                "layers.*.self_attn.k_proj": "colwise_gather_output",
                "layers.*.self_attn.v_proj": "colwise_gather_output",
                "layers.*.self_attn.o_proj": "rowwise_split_input",
            }
        for name in ("activation_ratio", "shared_expert_neuron_ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in (0, 1]")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func={self.scoring_func!r}: choose softmax or sigmoid")
        if self.neuron_score not in NEURON_SCORES:
            raise ValueError(f"neuron_score={self.neuron_score!r}: choose from {', '.join(NEURON_SCORES)}")
        for name in ("neuron_thresholds", "layer_activation_ratios"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != self.num_hidden_layers:
                raise ValueError(f"{name} has {len(numbers)} numbers for {self.num_hidden_layers} layers")
        layers = self.layer_activation_ratios
        if layers is not None and any(not 0 < ratio <= 1 for ratio in layers):
            raise ValueError(f"layer_activation_ratios={layers}: all must be in (0, 1]")
        if layers is not None and abs(sum(layers) / len(layers) - self.activation_ratio) > 1e-3:
            raise ValueError(
                f"activation_ratio={self.activation_ratio}: must be the mean of layer_activation_ratios={layers}; for one "
                "ratio in all layers set layer_activation_ratios=None"
            )

    @property
    def active_neurons(self) -> int:
        """K: neurons that a token keeps in each routed expert, at activation_ratio."""
        return top_k(self.activation_ratio, self.moe_intermediate_size)

    def active_neurons_of(self, layer_idx: int) -> int:
        """K of a layer."""
        ratio = self.activation_ratio if self.layer_activation_ratios is None else self.layer_activation_ratios[layer_idx]
        return top_k(ratio, self.moe_intermediate_size)


def top_k(ratio: float, num_neurons: int) -> int:
    """K = max(1, round(ratio * H)), halves rounded up."""
    return max(1, int(ratio * num_neurons + 0.5))


__all__ = ["MoneConfig", "top_k"]
