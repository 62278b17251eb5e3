"""Configuration of the model (`ModelConfig`), its layout (`ParallelConfig`) and its computation (`ComputeConfig`).

    model = ModelConfig(hidden_size=256, num_layers=4, num_experts=8, activation_ratio=0.25)
    model.active_neurons                       # 128 of 512 neurons

Each class checks its own fields; rules that span classes or need the world size live in `train.config_rules`. This module
does not import torch.
"""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mone_common.checks import check, deprecated

if TYPE_CHECKING:
    import torch

ACTIVATIONS = ("silu", "gelu", "relu", "sigmoid", "relu_squared")
"""Gate activations; `mone_model.activations` defines each of them."""
EXPERT_BACKENDS = ("grouped", "loop", "sparse")
"""Values of `compute.experts` beside auto; `mone_model.expert_backends` defines each of them."""
QK_LAYERNORM_SCOPES = ("head", "projection")
NEURON_SCORES = ("abs_gate", "gate", "abs_gate_up", "preactivation", "random", "random_in_training", "frozen")
"""Values of `model.neuron_score`; `mone_model.neuron_score` defines each of them."""
NEURON_BALANCE_FORMS = ("normalised", "unmasked", "masked")
RATIO_CURVES = ("linear", "cosine", "steps")
CHANGEABLE = (
    "rotary_base",
    "norm_epsilon",
    "activation",
    "neuron_score",
    "router_topk",
    "router_score_function",
    "router_pre_softmax",
    "router_scaling_factor",
)
"""Fields of `ModelConfig` that change no tensor, but what the weights compute."""
RECOMPUTE_MODULES = ("core_attn", "layernorm", "moe", "shared_experts")


@dataclass
class RatioPoint:
    """A point of `model.activation_ratio_schedule`."""

    step: int = 0
    """Training step, counted from 1; 0: the start."""
    ratio: float | None = None
    """The ratio at that step; null: model.activation_ratio."""


@dataclass
class ModelConfig:
    """The mathematics of a Mixture of Neuron Experts transformer, independent of the machine."""

    num_layers: int = 4
    """Transformer layers. Each has a Mixture of Neuron Experts in place of its MLP."""
    hidden_size: int = 256
    """Width D of the residual stream."""
    num_attention_heads: int = 4
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); null: as many as query heads."""
    kv_channels: int | None = None
    """Channels of a head; null: hidden_size / num_attention_heads."""
    qk_layernorm: bool = True
    """RMSNorm on queries and keys."""
    qk_layernorm_scope: str = "head"
    """Over what this norm is taken: each head, with one weight for all heads (head), or all heads of a token together, as in
    OLMoE (projection)."""
    seq_length: int = 256
    """Tokens in a training sequence, and the longest context the model is trained for."""
    vocab_size: int | None = None
    """Rows of the embedding before padding; null: the size of the tokenizer, from the manifest of the data."""
    vocab_multiple: int = 64
    """Pad the embedding to a multiple of this, so that tensor parallelism divides it."""
    tie_embeddings: bool = False
    """Use the input embedding as the output projection."""
    rotary_base: int = 10000
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections back into the residual stream use init_std / sqrt(2 num_layers)."""
    hidden_dropout: float = 0.0
    """Dropout on the residual branches."""
    attention_dropout: float = 0.0
    """Dropout on the attention probabilities."""

    num_experts: int = 8
    """Routed experts E of a layer."""
    router_topk: int = 2
    """Routed experts that a token activates."""
    moe_ffn_hidden_size: int = 512
    """Neurons H of one routed expert."""
    shared_expert_ffn_hidden_size: int = 512
    """Neurons of the shared expert, which processes every token; 0: no shared expert."""
    activation: str = "silu"
    """Gate activation: silu, gelu, relu, sigmoid or relu_squared."""
    activation_ratio: float = 0.25
    """Share of a routed expert's neurons that a token keeps: K = max(1, round(activation_ratio * H)). 1 is a plain MoE."""
    layer_activation_ratios: list[float] | None = None
    """The share in each layer, if layers keep different shares; their mean must be activation_ratio. null: all the same."""
    activation_ratio_schedule: list[RatioPoint] = field(default_factory=list)
    """The ratio during training, e.g. [{step: 0, ratio: 1}, {step: 1000}]: from 1 to activation_ratio in 1000 steps. The
    last ratio must be activation_ratio. Layers with ratios of their own follow in proportion. []: constant."""
    activation_ratio_curve: str = "linear"
    """How the ratio moves between these steps: linear, cosine (half a period), or steps (constant until the next one)."""
    neuron_score: str = "abs_gate"
    """By which score a token keeps neurons of routed experts: abs_gate (the paper's), gate, abs_gate_up, preactivation,
    random, random_in_training or frozen (`mone_model.neuron_score`). All but abs_gate are controls without kernels."""
    shared_expert_neuron_ratio: float = 1.0
    """The same share for the shared expert; 1 keeps it dense."""

    router_score_function: str = "softmax"
    """Router scores: softmax or sigmoid."""
    router_pre_softmax: bool = False
    """Softmax over all experts before the top-k (true) or over the chosen ones after it (false)."""
    router_scaling_factor: float | None = None
    """Multiplies the routing weights; null: 1."""
    aux_loss_coeff: float = 0.01
    """Coefficient of the Switch load-balancing loss over the global micro-batch; 0: off."""
    seq_aux_loss_coeff: float = 0.0
    """Coefficient of the load-balancing loss taken per sequence; 0: off."""
    global_aux_loss_coeff: float = 0.0
    """Coefficient of the load-balancing loss whose expert counts are accumulated over the global batch; 0: off."""
    z_loss_coeff: float = 0.0
    """Coefficient of the router z-loss (ST-MoE, arXiv 2202.08906); 0: off."""
    expert_bias: bool = False
    """Loss-free balancing (arXiv 2408.15664): a bias steers the choice of experts; needs router_score_function=sigmoid."""
    expert_bias_update_rate: float = 1e-3
    """Step of the expert bias, once per optimizer step."""
    expert_capacity_factor: float | None = None
    """Capacity of an expert, as a multiple of the mean load: tokens beyond it are dropped; null: drop none."""
    neuron_balance_coeff: float = 0.0
    """Coefficient of the neuron load-balancing loss (NG-LBL) inside each expert; 0: off."""
    neuron_balance_form: str = "normalised"
    """Form of NG-LBL: normalised, unmasked or masked (docs/architecture.md)."""
    neuron_balance_stride: int = 1
    """NG-LBL averages over every n-th token of each expert; 1: all tokens. A larger stride costs less."""
    neuron_bias: bool = False
    """Balancing without a loss: a bias on each neuron's |act(gate)| steers the selection (`mone_model.neuron_bias`)."""
    neuron_bias_update_rate: float = 1e-3
    """Step of the neuron bias, once per optimizer step, in units of |act(gate)|."""

    def __post_init__(self) -> None:
        # Files hold the points of the schedule as dictionaries.
        self.activation_ratio_schedule = [
            RatioPoint(**point) if isinstance(point, dict) else point for point in self.activation_ratio_schedule
        ]
        at_least_1 = "num_layers hidden_size num_attention_heads seq_length vocab_multiple num_experts neuron_balance_stride"
        for name in at_least_1.split():
            check(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        for name in ("num_query_groups", "kv_channels", "vocab_size"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"model.{name}", value, "must be null or at least 1")
        for name in ("rotary_base", "norm_epsilon", "init_std", "expert_bias_update_rate", "neuron_bias_update_rate"):
            check(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "must be positive")
        for name in ("router_scaling_factor", "expert_capacity_factor"):
            value = getattr(self, name)
            check(value is None or value > 0, f"model.{name}", value, "must be null or positive")
        for name in ("hidden_size", "moe_ffn_hidden_size"):
            value = getattr(self, name)
            check(
                value >= 8 and value % 8 == 0,
                f"model.{name}",
                value,
                f"must be a multiple of 8 (grouped GEMMs need rows of 16 bytes); nearest: {max(8, round(value / 8) * 8)}",
            )
        check(
            1 <= self.router_topk <= self.num_experts,
            "model.router_topk",
            self.router_topk,
            f"must be between 1 and model.num_experts={self.num_experts}",
        )
        check(
            self.kv_channels is not None or self.hidden_size % self.num_attention_heads == 0,
            "model.num_attention_heads",
            self.num_attention_heads,
            f"must divide model.hidden_size={self.hidden_size}, or set model.kv_channels",
        )
        check(
            self.head_size % 2 == 0,
            "model.kv_channels",
            self.head_size,
            "must be even: rotary embeddings turn pairs of channels",
        )
        check(
            self.num_query_groups is None or self.num_attention_heads % self.num_query_groups == 0,
            "model.num_query_groups",
            self.num_query_groups,
            f"must divide model.num_attention_heads={self.num_attention_heads}",
        )
        for name in ("activation_ratio", "shared_expert_neuron_ratio"):
            check(0 < getattr(self, name) <= 1, f"model.{name}", getattr(self, name), "must be in (0, 1]")
        self._check_ratios()
        check(
            self.shared_expert_ffn_hidden_size >= 0 and self.shared_expert_ffn_hidden_size % 8 == 0,
            "model.shared_expert_ffn_hidden_size",
            self.shared_expert_ffn_hidden_size,
            "must be 0 (no shared expert) or a multiple of 8",
        )
        check(self.activation in ACTIVATIONS, "model.activation", self.activation, f"choose from {', '.join(ACTIVATIONS)}")
        check(
            self.neuron_score in NEURON_SCORES,
            "model.neuron_score",
            self.neuron_score,
            f"choose from {', '.join(NEURON_SCORES)}",
        )
        check(
            self.neuron_score == "abs_gate" or not self.neuron_bias,
            "model.neuron_bias",
            self.neuron_bias,
            f"needs model.neuron_score=abs_gate, not {self.neuron_score}",
        )
        check(
            self.qk_layernorm_scope in QK_LAYERNORM_SCOPES,
            "model.qk_layernorm_scope",
            self.qk_layernorm_scope,
            f"choose from {', '.join(QK_LAYERNORM_SCOPES)}",
        )
        check(
            self.neuron_balance_form in NEURON_BALANCE_FORMS,
            "model.neuron_balance_form",
            self.neuron_balance_form,
            f"choose from {', '.join(NEURON_BALANCE_FORMS)}",
        )
        check(
            self.router_score_function in ("softmax", "sigmoid"),
            "model.router_score_function",
            self.router_score_function,
            "choose softmax or sigmoid",
        )
        check(
            not self.expert_bias or self.router_score_function == "sigmoid",
            "model.expert_bias",
            self.expert_bias,
            "needs model.router_score_function=sigmoid",
        )
        check(
            self.router_topk > 1 or self.router_pre_softmax or self.router_score_function == "sigmoid",
            "model.router_topk",
            self.router_topk,
            "with one expert a softmax over the chosen is always 1: set model.router_pre_softmax=true",
        )
        for name in (
            "aux_loss_coeff",
            "seq_aux_loss_coeff",
            "global_aux_loss_coeff",
            "z_loss_coeff",
            "neuron_balance_coeff",
        ):
            check(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "must not be negative")
        for name in ("hidden_dropout", "attention_dropout"):
            check(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "must be in [0, 1)")

    def _check_ratios(self) -> None:
        layers, schedule = self.layer_activation_ratios, self.activation_ratio_schedule
        final = f"model.activation_ratio={self.activation_ratio}"
        if layers is not None:
            option = "model.layer_activation_ratios"
            check(len(layers) == self.num_layers, option, layers, f"needs model.num_layers={self.num_layers} ratios")
            check(all(0 < ratio <= 1 for ratio in layers), option, layers, "all must be in (0, 1]")
            mean = sum(layers) / len(layers)
            check(
                abs(mean - self.activation_ratio) < 5e-4,
                "model.activation_ratio",
                self.activation_ratio,
                f"must be the mean of {option}, {mean:.4g}",
            )
            check(mean == 1 or self.activation_ratio < 1, "model.activation_ratio", 1, f"{option} has ratios below 1")
        option, curve = "model.activation_ratio_schedule", self.activation_ratio_curve
        check(curve in RATIO_CURVES, "model.activation_ratio_curve", curve, f"choose from {', '.join(RATIO_CURVES)}")
        steps, ratios = [point.step for point in schedule], [ratio for _, ratio in self._ratio_points]
        shown = ", ".join(f"{ratio:g} at step {step}" for step, ratio in self._ratio_points)
        check(all(0 < ratio <= 1 for ratio in ratios), option, shown, "all ratios must be in (0, 1]")
        check(steps == sorted({*steps}) and min(steps, default=0) >= 0, option, shown, "the steps must rise, from 0 on")
        check(not ratios or ratios[-1] == self.activation_ratio, option, shown, f"must end at {final}")
        check(
            layers is None or min(ratios, default=1) >= self.activation_ratio,
            option,
            shown,
            f"with model.layer_activation_ratios all ratios must be at least {final}",
        )

    @property
    def _ratio_points(self) -> list[tuple[int, float]]:
        return [
            (point.step, self.activation_ratio if point.ratio is None else point.ratio)
            for point in self.activation_ratio_schedule
        ]

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def active_neurons(self) -> int:
        """K: neurons that a token keeps in each routed expert, at `activation_ratio`."""
        return top_k(self.activation_ratio, self.moe_ffn_hidden_size)

    @property
    def active_neurons_by_layer(self) -> list[int]:
        """K of each layer."""
        ratios = self.layer_activation_ratios or [self.activation_ratio] * self.num_layers
        return [top_k(ratio, self.moe_ffn_hidden_size) for ratio in ratios]

    def describe_active_neurons(self) -> str:
        """K, or its range over the layers: 128, or 64 to 256."""
        by_layer = self.active_neurons_by_layer
        return f"{min(by_layer)}" if len({*by_layer}) == 1 else f"{min(by_layer)} to {max(by_layer)}"

    def at_step(self, step: int) -> "ModelConfig":
        """The model as it is at a step of training, counted from 1: with the ratios of that step, and no schedule.

        A layer with the ratio r_l drops 1 - r_l of its neurons at the end. Before, it drops as much of that as the schedule
        drops of 1 - activation_ratio.
        """
        if not self.activation_ratio_schedule:
            return self
        ratio, layers = self._scheduled_ratio(step), self.layer_activation_ratios
        if layers is not None and ratio != self.activation_ratio:
            dropped = (1 - ratio) / (1 - self.activation_ratio)
            layers = [1 - dropped * (1 - last) for last in layers]
            ratio = sum(layers) / len(layers)
        return replace(self, activation_ratio=ratio, layer_activation_ratios=layers, activation_ratio_schedule=[])

    def _scheduled_ratio(self, step: int) -> float:
        schedule = self._ratio_points
        after = next((index for index, (start, _) in enumerate(schedule) if start > step), len(schedule))
        if after in (0, len(schedule)):
            return schedule[min(after, len(schedule) - 1)][1]
        (start, ratio), (end, following) = schedule[after - 1], schedule[after]
        progress = (step - start) / (end - start)
        if self.activation_ratio_curve == "steps":
            progress = 0.0
        elif self.activation_ratio_curve == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return ratio + progress * (following - ratio)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size=null: set it, or give data whose manifest has the vocabulary size")
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def top_k(ratio: float, num_neurons: int) -> int:
    """K = max(1, round(ratio * H)), halves rounded up."""
    return max(1, int(ratio * num_neurons + 0.5))


@dataclass
class ParallelConfig:
    """How the model is spread over ranks. The data-parallel size is the world size divided by the other sizes."""

    tensor: int = 1
    """Tensor parallelism: ranks that share each attention and shared-expert weight; above 1 also sequence parallelism."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); null: one."""
    context: int = 1
    """Ranks that share a sequence; needs GPUs and Transformer Engine."""
    expert: int = 1
    """Ranks that share a layer's experts."""
    expert_tensor: int = 1
    """Ranks that share the neurons of one expert."""
    distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks."""
    overlap_communication: bool = False
    """Overlap gradient reduction and parameter gathering with computation."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context", "expert", "expert_tensor"):
            check(getattr(self, name) >= 1, f"parallel.{name}", getattr(self, name), "must be at least 1")
        check(
            self.virtual_pipeline is None or self.virtual_pipeline >= 2,
            "parallel.virtual_pipeline",
            self.virtual_pipeline,
            "must be null or at least 2",
        )

    @property
    def overlaps_parameter_gather(self) -> bool:
        """Whether the weights are gathered during the next forward pass, not at the end of the optimizer step."""
        return self.overlap_communication and self.distributed_optimizer


@dataclass
class ComputeConfig:
    """How the model is computed. These options change speed and rounding, not the mathematics."""

    precision: str = "fp32"
    """fp32, or bf16 with fp32 master weights and gradients."""
    transformer_impl: str = "auto"
    """local (Megatron-Core's own layers), transformer_engine, or auto: Transformer Engine where it is installed."""
    experts: str = "auto"
    """grouped: one grouped GEMM for all local experts; loop: one GEMM for each; sparse (CPU, fp32): up and down only of
    neurons that are kept; auto: grouped on GPUs, on CPUs the fastest in a measurement at the start."""
    cpu_kernels: str = "auto"
    """auto: on CPUs, the project's kernels compute the selection of neurons, sparse experts and attention where they
    can be compiled; off: torch's own operations compute everything, slower. Write "off" in quotes in YAML files."""
    token_dispatcher: str = "alltoall"
    """How tokens are sent to their experts: alltoall or allgather. Not used if every rank has all experts."""
    recompute: str = "none"
    """Activation recomputation: none, selective (recompute_modules) or full (whole layers)."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """Modules that selective recomputation recomputes: core_attn, layernorm, moe, shared_experts."""

    def __post_init__(self) -> None:
        if self.experts == "skip":
            deprecated("compute.experts=skip", "compute.experts=sparse")
            self.experts = "sparse"
        for name, choices in {
            "precision": ("fp32", "bf16"),
            "transformer_impl": ("auto", "local", "transformer_engine"),
            "experts": ("auto", *EXPERT_BACKENDS),
            "cpu_kernels": ("auto", "off"),
            "token_dispatcher": ("alltoall", "allgather"),
            "recompute": ("none", "selective", "full"),
        }.items():
            check(
                getattr(self, name) in choices,
                f"compute.{name}",
                getattr(self, name),
                f"choose from {', '.join(choices)}",
            )
        check(
            set(self.recompute_modules) <= set(RECOMPUTE_MODULES),
            "compute.recompute_modules",
            self.recompute_modules,
            f"choose from {', '.join(RECOMPUTE_MODULES)}",
        )

    @property
    def dtype(self) -> "torch.dtype":
        """Data type of weights and activations."""
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def why_not_sparse(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig) -> str | None:
    """What in the configuration forbids `compute.experts=sparse`; None if nothing does."""
    if compute.cpu_kernels == "off":
        return "needs compute.cpu_kernels=auto, not off"
    if compute.precision != "fp32":
        return f"needs compute.precision=fp32, not {compute.precision}"
    if model.neuron_score != "abs_gate":
        return f"needs model.neuron_score=abs_gate, not {model.neuron_score}"
    if model.hidden_size % 16 != 0:  # the kernels read 16 numbers at a time
        return f"needs model.hidden_size to be a multiple of 16, not {model.hidden_size}"
    if parallel.expert_tensor > 1:
        return f"needs whole experts: parallel.expert_tensor=1, not {parallel.expert_tensor}"
    return None
