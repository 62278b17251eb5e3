"""Fill a new model from a source of weights, the same on every layout.

    fill_weights(gpt, RandomWeights(model, seed=1234))          # on each rank, for the part of the model that it holds

Megatron-Core draws the weights of a rank from the random state of that rank, so that they depend on the layout. Here a
source (`mone_model.weight_sources`) gives each matrix and vector by its name in a checkpoint, and each rank asks for its
part.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.models.gpt import GPTModel

from mone_model.weight_sources import NEURON_BIAS, Wanted, WeightSource


@torch.no_grad()
def fill_weights(gpt: GPTModel, source: WeightSource) -> None:
    """Fill every weight and every saved buffer of this rank, one matrix or vector at a time."""
    state = gpt.sharded_state_dict()
    apply_factories(state)
    matrices = 0
    for tensor in nested_values(state):
        if not isinstance(tensor, ShardedTensor):
            continue
        for index, wanted in _parts(tensor):
            weight = source.read(wanted)
            if weight is not None:
                tensor.data[index].copy_(weight)
        is_matrix = tensor.data.dim() >= 2 and not tensor.key.endswith(NEURON_BIAS)
        matrices += tensor.data.numel() if is_matrix else 0
    assert matrices == sum(weight.numel() for weight in gpt.parameters() if weight.dim() >= 2), "a weight was not filled"


def _parts(tensor: ShardedTensor) -> Iterator[tuple[Any, Wanted]]:
    """The matrices of a stack [..., rows, columns], or the one vector; and where they are in the data of this rank."""
    axes = min(2, len(tensor.local_shape))
    stack, sizes = tensor.local_shape[:-axes], tensor.local_shape[-axes:]
    offsets, starts = tensor.global_offset[:-axes], tensor.global_offset[-axes:]
    layers, firsts = offsets[: tensor.prepend_axis_num], offsets[tensor.prepend_axis_num :]
    part = tuple(slice(int(start), int(start + size)) for start, size in zip(starts, sizes, strict=True))
    for index in np.ndindex(*stack):
        place = (*layers, *(first + i for first, i in zip(firsts, index, strict=True)))
        yield index, Wanted(tensor.key, tuple(map(int, place)), tuple(map(int, tensor.global_shape[-axes:])), part)
