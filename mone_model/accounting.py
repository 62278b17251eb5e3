"""Parameters, active parameters, FLOPs and memory, from the configuration alone.

    parameters = count_parameters(model)          # .total .active .active_expert_params
    flops = count_flops(model)                    # .dense .sparse, forward, per token
    memory = estimate_memory(model, parallel, compute, micro_batch_size=4, data_parallel_size=8)

Symbols: D hidden_size, H neurons of an expert, K kept, E experts, r router_topk, S shared neurons, V padded vocabulary,
L layers, s sequence length, a query heads, g key/value heads, c channels of a head.
"""

from dataclasses import dataclass

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, neurons_kept


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights of the whole model."""

    total: int
    """All weights."""
    experts: int
    """Those of routed experts: 3 D H E L."""
    active: int
    """Weights that one token touches: all but experts not chosen and, in the chosen, up and down of dropped neurons."""
    active_experts: int
    """Those of routed experts among them: r L (D H + 2 D K), the gate being always dense."""
    active_expert_params: float
    """Share of its routed experts' weights that a token touches: (1 + 2 K/H) / 3."""


def count_parameters(model: ModelConfig) -> Parameters:
    """Count weights as `build_gpt` makes them."""
    width, neurons, kept = model.hidden_size, model.moe_ffn_hidden_size, model.active_neurons
    queries, groups = model.num_attention_heads * model.head_size, _groups(model) * model.head_size
    attention = width * (queries + 2 * groups) + queries * width
    router = model.num_experts * width
    shared, shared_kept = model.shared_expert_ffn_hidden_size, _shared_kept(model)
    embeddings = model.padded_vocab_size * width * (1 if model.tie_embeddings else 2)
    experts = 3 * width * neurons * model.num_experts * model.num_layers
    active_experts = model.router_topk * model.num_layers * width * (neurons + 2 * kept)
    rest = embeddings + _norms(model) + model.num_layers * (attention + router)
    return Parameters(
        total=rest + experts + model.num_layers * 3 * width * shared,
        experts=experts,
        active=rest + active_experts + model.num_layers * width * (shared + 2 * shared_kept),
        active_experts=active_experts,
        active_expert_params=(1 + 2 * kept / neurons) / 3,
    )


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of a forward pass; a multiply-add is two. Training takes three times these."""

    dense: int
    """As computed by dense kernels, which multiply dropped neurons by zero; attention over the full s x s square."""
    sparse: int
    """As owed by the mathematics: up and down only for kept neurons."""


def count_flops(model: ModelConfig) -> Flops:
    """2 per weight of every matrix product, and 4 s a c for the scores and their application in each layer."""
    width, neurons, kept = model.hidden_size, model.moe_ffn_hidden_size, model.active_neurons
    queries, groups = model.num_attention_heads * model.head_size, _groups(model) * model.head_size
    projections = 2 * (width * (queries + 2 * groups) + queries * width)
    scores = 4 * model.seq_length * queries
    router = 2 * model.num_experts * width
    shared, shared_kept = model.shared_expert_ffn_hidden_size, _shared_kept(model)
    every_layer = projections + scores + router
    logits = 2 * width * model.padded_vocab_size
    return Flops(
        dense=logits + model.num_layers * (every_layer + 6 * width * (model.router_topk * neurons + shared)),
        sparse=logits
        + model.num_layers
        * (every_layer + 2 * width * (model.router_topk * (neurons + 2 * kept) + shared + 2 * shared_kept)),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank of the first pipeline stage."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    *,
    micro_batch_size: int,
    data_parallel_size: int,
) -> Memory:
    """Estimate a rank's memory: weights in compute.dtype, fp32 gradients, AdamW moments and, in bf16, fp32 masters.

    Activations are those kept for one micro-batch of every layer of the stage with balanced experts, times the pipeline
    stages in flight; full recomputation keeps each layer's input only. Attention keeps its a s^2 probabilities unless
    core_attn is recomputed or Transformer Engine's fused attention runs.
    """
    parameters = count_parameters(model)
    stage = parallel.pipeline
    embedding = model.padded_vocab_size * model.hidden_size * (2 if stage == 1 and not model.tie_embeddings else 1)
    all_embeddings = model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    # Norms and routers are whole on every tensor-parallel rank.
    replicated = _norms(model) + model.num_layers * model.num_experts * model.hidden_size
    split = parameters.total - parameters.experts - all_embeddings - replicated
    dense = (embedding + split / stage) / parallel.tensor + replicated / stage
    experts = parameters.experts / (stage * parallel.expert * parallel.expert_tensor)
    weight_bytes = 2 if compute.precision == "bf16" else 4
    state_bytes = 12 if compute.precision == "bf16" else 8
    dense_replicas = data_parallel_size * parallel.context if parallel.distributed_optimizer else 1
    world = data_parallel_size * parallel.context * parallel.tensor * stage
    expert_replicas = (
        max(1, world // (stage * parallel.expert * parallel.expert_tensor)) if parallel.distributed_optimizer else 1
    )
    return Memory(
        weights=round(weight_bytes * (dense + experts)),
        gradients=round(4 * (dense + experts)),
        optimizer=round(state_bytes * (dense / dense_replicas + experts / expert_replicas)),
        activations=_activation_bytes(model, parallel, compute, micro_batch_size),
    )


def _activation_bytes(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, micro_batch_size: int) -> int:
    tokens = micro_batch_size * model.seq_length // parallel.context
    width, item = model.hidden_size, 2 if compute.precision == "bf16" else 4
    layers = model.num_layers // parallel.pipeline
    residual = tokens * width * item // parallel.tensor
    if compute.recompute == "full":
        kept_per_layer = residual
    else:
        queries, groups = model.num_attention_heads * model.head_size, _groups(model) * model.head_size
        attention = tokens * (2 * queries + 4 * groups + width) * item // parallel.tensor
        if "core_attn" not in compute.recompute_modules or compute.recompute == "none":
            square = micro_batch_size * model.num_attention_heads * (model.seq_length // parallel.context) * model.seq_length
            attention += 2 * square * 4 // parallel.tensor
        rows = tokens * model.router_topk // parallel.tensor
        # Per row: input, gate and up, the activated gate, their product before and after the routing weight, the mask.
        routed = rows * ((2 * width + 6 * model.moe_ffn_hidden_size) * item + model.moe_ffn_hidden_size)
        shared = tokens * (width + 5 * model.shared_expert_ffn_hidden_size) * item // parallel.tensor
        moe = 0 if compute.recompute == "selective" and "moe" in compute.recompute_modules else routed + shared
        kept_per_layer = 4 * residual + attention + moe
    logits = 3 * tokens * model.padded_vocab_size * 4 // parallel.tensor if parallel.pipeline == 1 else 0
    return layers * kept_per_layer * parallel.pipeline + residual + logits


def _norms(model: ModelConfig) -> int:
    of_layer = 2 * model.hidden_size + (2 * model.head_size if model.qk_layernorm else 0)
    return model.num_layers * of_layer + model.hidden_size


def _groups(model: ModelConfig) -> int:
    return model.num_query_groups or model.num_attention_heads


def _shared_kept(model: ModelConfig) -> int:
    neurons = model.shared_expert_ffn_hidden_size
    return neurons_kept(model.shared_expert_neuron_ratio, neurons) if neurons else 0
