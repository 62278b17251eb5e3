"""Where each of our weights is in a Hugging Face model: one table for import, export and loading.

    for weight in weight_map(model, NAMES["mone"]):
        weight.key, weight.place        # "decoder.layers.mlp.experts.gate_up_weight", (layer, expert, 0)
        weight.parts                    # its rows, in order, as `Part`s of tensors of the other model

Our checkpoints hold stacks of matrices and vectors under one key; `place` is the position in the stack. A matrix of ours
is a concatenation of rows of matrices of the other model, transposed or not. Both models rotate halves of a head, so
positions need no permutation.

Shapes: D model width, H neurons of an expert, S neurons of the shared expert, V vocabulary, a heads, g groups of heads with
one key and value each, c channels of a head, E experts.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mone_model.config import ModelConfig


class Part(NamedTuple):
    """Consecutive rows (elements of a vector) of one of our weights, and where they are."""

    tensor: str | None
    """Name of the other model's tensor; None: there is none, and the rows are 0."""
    rows: int
    """Number of rows."""
    first: int = 0
    """The first of them in the other matrix; the first column if it is transposed."""
    at: tuple[int, ...] = ()
    """Position of the other matrix in its tensor, if that is a stack."""
    transposed: bool = False
    """Whether rows of ours are columns there."""


class Weight(NamedTuple):
    """One matrix or vector of our model."""

    key: str
    """Name in our checkpoints."""
    place: tuple[int, ...]
    """Position in the stack of that name: layer, expert, and 0 for gates or 1 for ups, as far as they apply."""
    shape: tuple[int, ...]
    """[rows, columns], or [length] of a vector."""
    parts: tuple[Part, ...]
    """Its rows, in order."""


@dataclass(frozen=True)
class Projection:
    """Where the gate, up or down matrix of an expert is."""

    tensor: str
    """Name below the layer; {e} is the expert."""
    stacked: bool = False
    """Whether the tensor holds all experts, as its first axis."""
    second: bool = False
    """Whether the matrix is the second half of the rows, after the gates."""


@dataclass(frozen=True)
class Names:
    """Names of a family's tensors below `model.layers.N.`, as far as families differ."""

    router: str | None
    gate: Projection
    up: Projection
    down: Projection
    shared: tuple[Projection, Projection, Projection] | None = None
    """Gate, up and down of the shared expert."""
    expert_bias: str | None = None
    neuron_bias: str | None = None


def _separate(prefix: str, names: tuple[str, str, str]) -> tuple[Projection, Projection, Projection]:
    gate, up, down = (Projection(f"{prefix}.{name}.weight") for name in names)
    return gate, up, down


def _fused(gate_up: str, down: str, *, stacked: bool) -> tuple[Projection, Projection, Projection]:
    return Projection(gate_up, stacked), Projection(gate_up, stacked, second=True), Projection(down, stacked)


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FUSED = _fused("mlp.experts.gate_up_proj", "mlp.experts.down_proj", stacked=True)
NAMES = {
    "mone": Names(
        "mlp.gate.weight",
        *_FUSED,
        shared=_separate("mlp.shared_expert", _PROJECTIONS),
        expert_bias="mlp.gate.e_score_correction_bias",
        neuron_bias="mlp.experts.neuron_bias",
    ),
    "qwen3_moe": Names("mlp.gate.weight", *_separate("mlp.experts.{e}", _PROJECTIONS)),
    "mixtral": Names("block_sparse_moe.gate.weight", *_separate("block_sparse_moe.experts.{e}", ("w1", "w3", "w2"))),
    "granitemoeshared": Names(
        "block_sparse_moe.router.layer.weight",
        *_fused("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight", stacked=True),
        shared=_fused("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight", stacked=False),
    ),
    "glm4_moe": Names(
        "mlp.gate.weight",
        *_separate("mlp.experts.{e}", _PROJECTIONS),
        shared=_separate("mlp.shared_experts", _PROJECTIONS),
        expert_bias="mlp.gate.e_score_correction_bias",
    ),
    "dense": Names(None, *_separate("mlp", _PROJECTIONS)),
}
"""Tensor names by format. `mone` is also how transformers holds Qwen3-MoE, OLMoE and Mixtral in memory."""

LAYERS = "decoder.layers."
BIASES = ("e_score_correction_bias", "neuron_bias")
"""Ends of the names of tensors that are added to scores."""


def weight_map(model: ModelConfig, names: Names) -> Iterator[Weight]:
    """Every weight of our model, in the order of the layers.

    A dense model (`names.router` is None) is a model of one expert, whose router has no tensor there: it is 0.
    """
    width, head, heads = model.hidden_size, model.head_size, model.num_attention_heads
    groups = model.num_query_groups or heads
    yield _embedding("embedding.word_embeddings.weight", "model.embed_tokens.weight", model)
    for layer in range(model.num_layers):
        there, at = f"model.layers.{layer}.", (layer,)

        def vector(ours: str, theirs: str, length: int, there: str = there, at: tuple[int, ...] = at) -> Weight:
            return Weight(LAYERS + ours, at, (length,), (Part(there + theirs, length),))

        yield vector("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", width)
        per_group = heads // groups * head
        parts = []
        for group in range(groups):
            parts += [
                Part(f"{there}self_attn.q_proj.weight", per_group, group * per_group),
                Part(f"{there}self_attn.k_proj.weight", head, group * head),
                Part(f"{there}self_attn.v_proj.weight", head, group * head),
            ]
        yield Weight(f"{LAYERS}self_attention.linear_qkv.weight", at, ((heads + 2 * groups) * head, width), tuple(parts))
        if model.qk_layernorm:
            scope = (1, 1) if model.qk_layernorm_scope == "head" else (heads, groups)
            for name, count in zip("qk", scope, strict=True):
                yield vector(f"self_attention.{name}_layernorm.weight", f"self_attn.{name}_norm.weight", count * head)
        out = Part(f"{there}self_attn.o_proj.weight", width)
        yield Weight(f"{LAYERS}self_attention.linear_proj.weight", at, (width, heads * head), (out,))
        yield vector("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", width)
        yield from _experts(model, names, layer, there)
    yield Weight("decoder.final_layernorm.weight", (), (width,), (Part("model.norm.weight", width),))
    if not model.tie_embeddings:
        yield _embedding("output_layer.weight", "lm_head.weight", model)


def _embedding(ours: str, theirs: str, model: ModelConfig) -> Weight:
    rows = model.padded_vocab_size
    assert model.vocab_size is not None
    parts = [Part(theirs, model.vocab_size), Part(None, rows - model.vocab_size)]
    return Weight(ours, (), (rows, model.hidden_size), tuple(part for part in parts if part.rows))


def _experts(model: ModelConfig, names: Names, layer: int, there: str) -> Iterator[Weight]:
    width, neurons, shared = model.hidden_size, model.moe_ffn_hidden_size, model.shared_expert_ffn_hidden_size
    router = None if names.router is None else there + names.router
    part = Part(router, model.num_experts)
    yield Weight(f"{LAYERS}mlp.router.weight", (layer,), (model.num_experts, width), (part,))
    if model.expert_bias:
        assert names.expert_bias is not None
        part = Part(there + names.expert_bias, model.num_experts)
        yield Weight(f"{LAYERS}mlp.router.expert_bias", (layer,), (model.num_experts,), (part,))
    if model.neuron_bias:
        assert names.neuron_bias is not None
        part = Part(there + names.neuron_bias, model.num_experts)
        yield Weight(f"{LAYERS}mlp.experts.neuron_bias", (layer,), (model.num_experts, neurons), (part,))
    for expert in range(model.num_experts):
        for half, projection in enumerate((names.gate, names.up)):
            part = _part(projection, neurons, there, expert)
            yield Weight(f"{LAYERS}mlp.experts.gate_up_weight", (layer, expert, half), (neurons, width), (part,))
        part = _part(names.down, neurons, there, expert)._replace(transposed=True)
        yield Weight(f"{LAYERS}mlp.experts.down_weight", (layer, expert), (neurons, width), (part,))
    if shared:
        assert names.shared is not None
        gate, up, down = names.shared
        key, parts = f"{LAYERS}mlp.shared_experts.linear_fc", (_part(gate, shared, there), _part(up, shared, there))
        yield Weight(f"{key}1.weight", (layer,), (2 * shared, width), parts)
        yield Weight(f"{key}2.weight", (layer,), (width, shared), (_part(down, width, there),))


def _part(projection: Projection, rows: int, there: str, expert: int = 0) -> Part:
    at = (expert,) if projection.stacked else ()
    return Part(there + projection.tensor.format(e=expert), rows, rows if projection.second else 0, at)


class Piece(NamedTuple):
    """Rows of one of our weights that are consecutive rows (columns, if transposed) of a matrix of the other model."""

    weight: Weight
    start: int
    """The first of the rows in our weight."""
    part: Part


class Tensor(NamedTuple):
    """A tensor of the other model, made of ours."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def tensors_of(weights: Iterator[Weight]) -> Iterator[Tensor]:
    """The other model's tensors, from our weights: the table read in the other direction, in the same order.

    A tensor follows when all weights of its layer are known, so that at most one layer's table is in memory.
    """
    pieces: dict[str, list[Piece]] = {}
    layer: tuple[int, ...] = ()
    for weight in weights:
        if weight.place[:1] != layer:
            yield from (_tensor(name, found) for name, found in pieces.items())
            pieces, layer = {}, weight.place[:1]
        start = 0
        for part in weight.parts:
            if part.tensor is not None:
                pieces.setdefault(part.tensor, []).append(Piece(weight, start, part))
            start += part.rows
    yield from (_tensor(name, found) for name, found in pieces.items())


def _tensor(name: str, pieces: list[Piece]) -> Tensor:
    first = pieces[0]
    rows = max(piece.part.first + piece.part.rows for piece in pieces)
    columns = first.weight.shape[1:]
    matrix = (*columns, rows) if first.part.transposed else (rows, *columns)
    stack = tuple(1 + max(positions) for positions in zip(*(piece.part.at for piece in pieces), strict=True))
    tensor = Tensor(name, (*stack, *matrix), tuple(pieces))
    covered = sum(piece.part.rows * math.prod(columns) for piece in pieces)
    assert covered == math.prod(tensor.shape), f"{name}: pieces of {covered} of {math.prod(tensor.shape)} numbers"
    return tensor
