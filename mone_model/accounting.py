"""Parameters, active parameters, FLOPs and memory, from the configuration alone.

    parameters = count_parameters(model)          # .total .active .active_expert_params .active_moe_params
    flops = count_flops(model)                    # .dense .sparse, forward, per token
    memory = estimate_memory(model, parallel, compute, micro_batch_size=4, data_parallel_size=8)
    width = equal_active_width(160, 0.25)         # 320 neurons of which 80 are kept cost a token what 160 dense ones do
    parts = count_communication(model, parallel, compute, micro_batch_size=4, ...)  # bytes sent, by parallel dimension

Symbols: D hidden_size, H neurons of an expert, K kept, E experts, r router_topk, S shared neurons, V padded vocabulary,
L layers, s sequence length, a query heads, g key/value heads, c channels of a head.
"""

import dataclasses
import functools
from dataclasses import dataclass

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, top_k


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights of the whole model."""

    total: int
    """All weights."""
    experts: int
    """Those of routed experts: 3 D H E L."""
    active: int
    """Weights that one token touches: all but experts not chosen and, in the chosen, what dropped neurons do not need.

    By `neuron_score`, selection needs the gates of dropped neurons, their gates and ups (abs_gate_up), or nothing of them
    (random and frozen, whose projection is no weight). With random_in_training no neuron is dropped after training.
    """
    active_experts: int
    """Those of routed experts among them, if selection needs the gates: r L (D H + 2 D K)."""
    active_expert_params: float
    """Share of its routed experts' weights that a token touches: then (1 + 2 K/H) / 3."""
    active_moe_params: float
    """Share of its MoE layer's weights that a token touches: of its routed experts, the shared expert and the router.

    Then (E + r (H + 2 K) + S + 2 S_K) / (E + 3 r H + 3 S), with S_K kept of the S shared neurons; a plain MoE's is 1.
    If layers keep different shares, K is the mean in both.
    """


_NEEDED_OF_DROPPED = {"abs_gate_up": 2, "random": 0, "random_in_training": 0, "frozen": 0}
"""Rows of weights that selection needs of a dropped neuron by score; others: 1, the gate."""


def _needed_rows(model: ModelConfig, *, training: bool = False) -> int:
    """Rows of weights of routed experts that a token needs in one expert of each layer, in a forward pass."""
    kept, every = sum(model.active_neurons_by_layer), model.num_layers * model.moe_ffn_hidden_size
    if model.neuron_score == "random_in_training" and not training:
        return 3 * every
    return 3 * kept + _NEEDED_OF_DROPPED.get(model.neuron_score, 1) * (every - kept)


def count_parameters(model: ModelConfig) -> Parameters:
    """Count weights as `build_gpt` makes them."""
    width, neurons, layers = model.hidden_size, model.moe_ffn_hidden_size, model.num_layers
    needed = _needed_rows(model)
    queries, groups = model.num_attention_heads * model.head_size, _groups(model) * model.head_size
    attention = width * (queries + 2 * groups) + queries * width
    router = model.num_experts * width
    shared, shared_k = model.shared_expert_ffn_hidden_size, _shared_k(model)
    active_experts = model.router_topk * width * needed
    active_moe = layers * (router + width * (shared + 2 * shared_k)) + active_experts
    embeddings = model.padded_vocab_size * width * (1 if model.tie_embeddings else 2)
    experts = 3 * width * neurons * model.num_experts * layers
    rest = embeddings + _norms(model) + layers * (attention + router)
    return Parameters(
        total=rest + experts + layers * 3 * width * shared,
        experts=experts,
        active=rest + active_experts + layers * width * (shared + 2 * shared_k),
        active_experts=active_experts,
        active_expert_params=needed / (3 * layers * neurons),
        active_moe_params=active_moe / (layers * (router + 3 * width * (model.router_topk * neurons + shared))),
    )


def equal_active_width(dense_neurons: int, activation_ratio: float) -> int:
    """Neurons H of an expert of which a token touches as many weights as of a dense one with `dense_neurons` N.

    H + 2 K = 3 N with K = activation_ratio H, so H = 3 N / (1 + 2 activation_ratio), to the nearest multiple of 8.
    """
    return max(8, 8 * round(3 * dense_neurons / (1 + 2 * activation_ratio) / 8))


def equal_flops_width(dense_neurons: int, activation_ratio: float) -> int:
    """Neurons H of an expert that owes as many training FLOPs as a dense one with `dense_neurons` N.

    H + 8 K = 9 N with K = activation_ratio H (`count_training_flops`), so H = 9 N / (1 + 8 activation_ratio), to the nearest
    multiple of 8.
    """
    return max(8, 8 * round(9 * dense_neurons / (1 + 8 * activation_ratio) / 8))


def equal_total_experts(num_experts: int, activation_ratio: float, splits: int = 1) -> int:
    """Experts of a plain MoE with the total and active expert parameters of a MoNE with `num_experts` E.

    Each token activates `splits` times as many experts, whose width is that of `equal_total_width`:
    E' = E splits 3 / (1 + 2 activation_ratio). ValueError if that is no integer.
    """
    experts = num_experts * splits * 3 / (1 + 2 * activation_ratio)
    if abs(experts - round(experts)) > 1e-9:
        raise ValueError(
            f"equal_total_experts:{num_experts},{activation_ratio},{splits}: {experts:.3f} is no number of experts; "
            "choose a ratio such as 0.25 or 1, or other splits"
        )
    return round(experts)


def equal_total_width(neurons: int, activation_ratio: float, splits: int = 1) -> int:
    """Neurons of each of the `equal_total_experts`: neurons (1 + 2 activation_ratio) / (3 splits).

    ValueError unless that is a multiple of 8.
    """
    width = neurons * (1 + 2 * activation_ratio) / (3 * splits)
    if width < 8 or abs(width / 8 - round(width / 8)) > 1e-9:
        raise ValueError(f"equal_total_width:{neurons},{activation_ratio},{splits}: {width:.3f} is no multiple of 8")
    return round(width)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token; a multiply-add is two."""

    dense: int
    """As computed by dense kernels, which multiply dropped neurons by zero; attention over the full s x s square."""
    sparse: int
    """As owed by the mathematics: up and down only for kept neurons."""


def count_flops(model: ModelConfig) -> Flops:
    """Of a forward pass: 2 per weight of every matrix product, and 4 s a c for attention's two products in each layer."""
    width, neurons, layers = model.hidden_size, model.moe_ffn_hidden_size, model.num_layers
    queries, groups = model.num_attention_heads * model.head_size, _groups(model) * model.head_size
    projections = 2 * (width * (queries + 2 * groups) + queries * width)
    scores = 4 * model.seq_length * queries
    router = 2 * model.num_experts * width
    shared, shared_k = model.shared_expert_ffn_hidden_size, _shared_k(model)
    every_layer = projections + scores + router
    logits = 2 * width * model.padded_vocab_size
    projected = _projected_rows(model)
    return Flops(
        dense=logits
        + layers * (every_layer + 6 * width * (model.router_topk * neurons + shared))
        + 2 * width * model.router_topk * projected,
        sparse=logits
        + layers * (every_layer + 2 * width * (shared + 2 * shared_k))
        + 2 * width * model.router_topk * (_needed_rows(model) + projected),
    )


def _projected_rows(model: ModelConfig) -> int:
    """Rows of the frozen projections that select in one expert of each layer; they have no gradient."""
    neurons = model.moe_ffn_hidden_size
    selecting = sum(kept < neurons for kept in model.active_neurons_by_layer)
    return selecting * neurons if model.neuron_score == "frozen" else 0


def count_training_flops(model: ModelConfig, steps: int | None = None) -> Flops:
    """Of a forward and backward pass: three times those of a forward pass, but owed gates have gradients only where kept.

    A routed expert owes 2 D (H + 8 K): the gates of all neurons forward, everything else of the K kept neurons. With a
    balance loss that reaches dropped neurons, the gates of all neurons owe their backward pass too. Other scores than the
    gate's need other rows of dropped neurons (`Parameters.active`), forward only.

    steps: with a schedule of the ratio, the mean over these training steps; None: at the end of the schedule.
    """
    if model.activation_ratio_schedule and steps is not None:
        sampled = range(1, steps + 1, -(-steps // 1000))
        owed = [count_training_flops(model.at_step(step)).sparse for step in sampled]
        return Flops(dense=count_training_flops(model).dense, sparse=round(sum(owed) / len(owed)))
    forward, row = count_flops(model), 2 * model.hidden_size * model.router_topk
    needed, projected = _needed_rows(model, training=True), _projected_rows(model)
    kept = sum(model.active_neurons_by_layer)
    dropped = model.num_layers * model.moe_ffn_hidden_size - kept
    reached = model.neuron_balance_coeff > 0 and model.neuron_balance_form != "masked"
    gates = dropped if reached else 0
    # The loss needs the gates of dropped neurons, which these scores do not.
    more = gates if _NEEDED_OF_DROPPED.get(model.neuron_score) == 0 else 0
    of_experts = row * (needed + projected + more) + 2 * row * (3 * kept + gates)
    others = 3 * (forward.sparse - row * (_needed_rows(model) + projected))
    dropped_shared = model.num_layers * (model.shared_expert_ffn_hidden_size - _shared_k(model))
    return Flops(
        dense=3 * forward.dense - 2 * row * projected,
        sparse=of_experts + others - 4 * model.hidden_size * dropped_shared,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: int
    """In compute.dtype."""
    gradients: int
    """In fp32."""
    optimizer: int
    """AdamW's two moments and, in bf16, fp32 master weights."""
    activations: int
    """Kept between forward and backward."""
    working: int
    """The larger of the two temporary parts: the gradient of the logits, or one recomputed layer."""

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def estimate_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    *,
    micro_batch_size: int,
    data_parallel_size: int,
    micro_batches: int | None = None,
    fused: bool = False,
) -> Memory:
    """Estimate a rank's memory with balanced experts.

    micro_batches: of a step; None: as many as the pipeline holds at once, or more.
    fused: Transformer Engine's norms and attention, which keep less; else the local layers'.

    Weights, gradients and optimizer are those of the first pipeline stage. It also holds the activations of as many
    micro-batches as there are stages, with virtual stages a little more; the last stage those of one, and the logits:
    the larger counts. With a schedule of the ratio, it is the memory of the step that needs most. Not in it: what the
    allocator and the communication libraries keep for themselves.
    """
    if model.activation_ratio_schedule:
        estimate = functools.partial(
            estimate_memory,
            parallel=parallel,
            compute=compute,
            micro_batch_size=micro_batch_size,
            data_parallel_size=data_parallel_size,
            micro_batches=micro_batches,
            fused=fused,
        )
        return max(map(estimate, _ratios_of_schedule(model)), key=lambda memory: memory.total)
    stage = parallel.pipeline
    dense, experts = _rank_weights(model, parallel)
    weight_bytes = 2 if compute.precision == "bf16" else 4
    state_bytes = 12 if compute.precision == "bf16" else 8
    dense_replicas = data_parallel_size * parallel.context if parallel.distributed_optimizer else 1
    world = data_parallel_size * parallel.context * parallel.tensor * stage
    expert_replicas = (
        max(1, world // (stage * parallel.expert * parallel.expert_tensor)) if parallel.distributed_optimizer else 1
    )
    tokens = micro_batch_size * model.seq_length / parallel.context
    layers = model.num_layers // stage
    every_layer = _layer_activations(model, parallel, compute, tokens, fused)
    recomputed = (
        _layer_activations(model, parallel, dataclasses.replace(compute, recompute="none"), tokens, fused) - every_layer
    )
    # Megatron-Core's interleaved schedule begins (stages - 1) chunks of layers more.
    held = stage if parallel.virtual_pipeline is None else stage + (stage - 1) / parallel.virtual_pipeline
    first = layers * every_layer * min(held, micro_batches or held)
    last = layers * every_layer + _loss_activations(model, parallel, compute, tokens, fused)
    logits_gradient = tokens * model.padded_vocab_size * (4 + weight_bytes) / parallel.tensor
    return Memory(
        weights=round(weight_bytes * (dense + experts)),
        gradients=round(4 * (dense + experts)),
        optimizer=round(state_bytes * (dense / dense_replicas + experts / expert_replicas)),
        activations=round(last if stage == 1 else max(first, last)),
        working=round(max(logits_gradient if stage == 1 or last > first else 0, recomputed)),
    )


def _ratios_of_schedule(model: ModelConfig) -> list[ModelConfig]:
    """The model at the points of its schedule and, if it begins with all neurons, at the largest ratio that selects."""
    models = [model.at_step(point.step) for point in model.activation_ratio_schedule]
    selecting = 1 - 1 / model.moe_ffn_hidden_size
    if model.activation_ratio < selecting < max(each.activation_ratio for each in models):
        constant = dataclasses.replace(model, layer_activation_ratios=None, activation_ratio_schedule=[])
        models.append(dataclasses.replace(constant, activation_ratio=selecting))
    return models


def _rank_weights(model: ModelConfig, parallel: ParallelConfig) -> tuple[float, float]:
    """Weights of a rank of the first pipeline stage: those of routed experts apart."""
    parameters = count_parameters(model)
    stage = parallel.pipeline
    embedding = model.padded_vocab_size * model.hidden_size * (2 if stage == 1 and not model.tie_embeddings else 1)
    all_embeddings = model.padded_vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    # Norms and routers are whole on every tensor-parallel rank, except norms over all heads.
    replicated = _norms(model) + model.num_layers * model.num_experts * model.hidden_size
    if model.qk_layernorm_scope == "projection":
        replicated -= model.num_layers * _qk_norms(model)
    split = parameters.total - parameters.experts - all_embeddings - replicated
    dense = (embedding + split / stage) / parallel.tensor + replicated / stage
    return dense, parameters.experts / (stage * parallel.expert * parallel.expert_tensor)


def _layer_activations(
    model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, tokens: float, fused: bool
) -> float:
    """Bytes that one layer keeps for its backward pass of one micro-batch; tokens: of this context-parallel rank."""
    width, shared = model.hidden_size, model.shared_expert_ffn_hidden_size
    item = 2 if compute.precision == "bf16" else 4
    modules = {"none": [], "selective": compute.recompute_modules, "full": []}[compute.recompute]
    # Sequence parallelism splits the tokens, tensor parallelism the heads and neurons: everything is divided.
    tokens = tokens / parallel.tensor
    if compute.recompute == "full":
        return tokens * width * item
    queries, groups = model.num_attention_heads * model.head_size, _groups(model) * model.head_size
    norm = tokens * width * _saved_by_norm(item, fused)  # and then comes what the projections read
    # What the projections read, the rotated queries and keys, the projection itself for its values, and the context.
    attention = tokens * (width + 3 * queries + 3 * groups) * item
    # Cosines and sines of the positions, for queries and for keys.
    attention += 4 * model.seq_length / parallel.context * model.head_size * item
    if not fused and model.qk_layernorm:
        # In fp32 their norm reads the projection itself, out of which the queries of a group are copied.
        read = 0 if item == 4 and groups == queries else queries + (0 if item == 4 else groups)
        attention += tokens * (read + queries + groups) * 4
    if not fused and "core_attn" not in modules:
        # The logarithm of the sum of exponentials for each head.
        attention += tokens * model.num_attention_heads * 4
    rows = tokens * model.router_topk
    routed = rows * (width * parallel.expert_tensor * item + _saved_by_neurons(model, parallel, compute, item))
    # Logits, probabilities, the routing map; for each row its expert, position and weight.
    routed += tokens * model.num_experts * 9 + rows * 24
    dense = 5 * tokens * shared * item
    if _shared_k(model) < shared and parallel.tensor == 1:
        dense = tokens * (_compressed(shared, _shared_k(model), item) + shared * item)
    elif _shared_k(model) == shared and model.activation == "silu":  # gate, up and their product in one operation
        dense = 3 * tokens * shared * item
    moe = tokens * width * item
    if "moe" not in modules:
        moe += routed + (0 if "shared_experts" in modules else dense)
    return 2 * norm + attention + moe


def _saved_by_norm(item: int, fused: bool) -> int:
    """Bytes that a norm keeps of each number: Transformer Engine's its input, torch's that and the normalised, in fp32."""
    return item if fused else 8


def _saved_by_neurons(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, item: int) -> float:
    """Bytes that the neurons of one token in one expert keep, beside their input, as a mean over the layers.

    compute.experts=auto: as if grouped.
    """
    by_layer = model.active_neurons_by_layer
    return sum(_saved_by_kept(model, parallel, compute, item, k) for k in by_layer) / len(by_layer)


def _saved_by_kept(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, item: int, k: int) -> float:
    """The same in a layer that keeps k neurons."""
    neurons = model.moe_ffn_hidden_size
    balancing, stride = model.neuron_balance_coeff > 0, model.neuron_balance_stride
    compressed = _compressed(neurons, k, item)
    if compute.experts == "sparse":  # the balance loss: the gates of the rows that it reads
        return compressed + (neurons * item / stride if balancing and model.neuron_balance_form != "masked" else 0)
    if k < neurons and parallel.expert_tensor == 1:
        # The balance loss: the product with gate and up; of the rows that it reads three numbers in fp32.
        return compressed + neurons * item + (neurons * (2 * item + 12 / stride) if balancing else 0)
    # Gate and up, the activated gate, its product with up, that times the routing weight; the mask.
    return 5 * neurons * item + (neurons if k < neurons else 0)


def _compressed(neurons: int, k: int, item: int) -> float:
    """Bytes of gate and up where they count, and a bit for each neuron."""
    return 2 * k * item + neurons / 8


def _loss_activations(
    model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, tokens: float, fused: bool
) -> float:
    """The same of the last norm, the output projection and the loss, which keeps the probabilities in fp32."""
    item = 2 if compute.precision == "bf16" else 4
    norm = model.hidden_size * _saved_by_norm(item, fused)
    return tokens / parallel.tensor * (norm + model.hidden_size * item + model.padded_vocab_size * 4)


@dataclass(frozen=True)
class Traffic:
    """What one parallel dimension moves."""

    ranks: int
    """Ranks of one of its groups."""
    span: int
    """Consecutive ranks that contain such a group."""
    bytes: int
    """That a rank sends in one optimizer step."""


def count_communication(
    model: ModelConfig,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    *,
    micro_batch_size: int,
    data_parallel_size: int,
    micro_batches: int,
) -> dict[str, Traffic]:
    """Bytes that a rank of the first pipeline stage sends in a step, by parallel dimension; those of one rank are left out.

    Ring collectives over n ranks: a reduce-scatter or an all-gather of B bytes sends B (n - 1) / n. Ranks are numbered in
    Megatron-Core's order: tensor, context, (expert,) data, pipeline.
    """
    width, item = model.hidden_size, 2 if compute.precision == "bf16" else 4
    tensor, expert, pipeline = parallel.tensor, parallel.expert * parallel.expert_tensor, parallel.pipeline
    dense_ranks = data_parallel_size * parallel.context
    stage = dense_ranks * tensor
    dense, experts = _rank_weights(model, parallel)
    layers = model.num_layers // pipeline
    residual = micro_batches * micro_batch_size * model.seq_length // parallel.context * width * item
    rows = residual // tensor * model.router_topk
    # Forward, backward, and once more forward where it is recomputed.
    passes = 3 if compute.recompute == "full" or _recomputes_moe(compute) else 2
    if compute.token_dispatcher == "alltoall":
        # Each row travels to its expert and back; expert-tensor ranks gather the rows of all of them, and reduce after.
        away = (parallel.expert - 1) / parallel.expert + (parallel.expert_tensor - 1)
        routed = layers * 2 * passes * rows * away
    else:
        routed = layers * 2 * passes * residual // tensor * (expert - 1)
    shared = 1 if model.shared_expert_ffn_hidden_size else 0
    # Sequence parallelism: gather and scatter around attention and the shared expert, and again in the backward pass,
    # which also gathers the inputs of the projections again.
    around = layers * (1 + shared) * (5 + (2 if compute.recompute == "full" else 0))
    groups = _groups(model) * model.head_size
    sent = {
        "tensor": Traffic(tensor, tensor, round((around + 2) * residual * (tensor - 1) / tensor)),
        "context": Traffic(
            parallel.context,
            tensor * parallel.context,
            round(layers * 3 * (parallel.context - 1) * residual / width * 2 * groups / tensor),
        ),
        "expert": Traffic(expert, expert, round(routed)),
        "pipeline": Traffic(
            pipeline,
            stage * pipeline,
            2 * residual // tensor * (parallel.virtual_pipeline or 1),
        ),
        "data": Traffic(dense_ranks, stage, _reduced(dense, dense_ranks, item)),
        "expert data": Traffic(stage // expert, stage, _reduced(experts, stage // expert, item)),
    }
    return {name: part for name, part in sent.items() if part.ranks > 1}


def _reduced(weights: float, ranks: int, item: int) -> int:
    """Bytes to reduce fp32 gradients to their owners, and to gather the new weights (or all gradients) from them."""
    return round(weights * (4 + item) * (ranks - 1) / ranks)


def _recomputes_moe(compute: ComputeConfig) -> bool:
    return compute.recompute == "selective" and "moe" in compute.recompute_modules


def _norms(model: ModelConfig) -> int:
    return model.num_layers * (2 * model.hidden_size + _qk_norms(model)) + model.hidden_size


def _qk_norms(model: ModelConfig) -> int:
    """Weights of the norms of queries and keys of one layer."""
    if not model.qk_layernorm:
        return 0
    heads = 2 if model.qk_layernorm_scope == "head" else model.num_attention_heads + _groups(model)
    return heads * model.head_size


def _groups(model: ModelConfig) -> int:
    return model.num_query_groups or model.num_attention_heads


def _shared_k(model: ModelConfig) -> int:
    neurons = model.shared_expert_ffn_hidden_size
    return top_k(model.shared_expert_neuron_ratio, neurons) if neurons else 0
