"""Initial weights that are the same on every layout.

    draw_initial_weights(gpt, seed=1234)          # on each rank, for the part of the model that it holds

Megatron-Core draws the weights of a rank from the random state of that rank, so that they depend on the layout. Here each
matrix has a random stream of its own, seeded by its name in a checkpoint, and each rank keeps its part of the matrix.
"""

import hashlib
import math

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.models.gpt import GPTModel

INTO_THE_RESIDUAL_STREAM = ("linear_proj.weight", "linear_fc2.weight", "experts.down_weight")


@torch.no_grad()
def draw_initial_weights(gpt: GPTModel, *, seed: int) -> None:
    """Fill every matrix of this rank from a normal distribution.

    The standard deviation is init_method_std, and init_method_std / sqrt(2 num_layers) for projections into the residual
    stream (GPT-2). Vectors are the weights of norms and stay 1.
    """
    state = gpt.sharded_state_dict()
    apply_factories(state)
    drawn = 0
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and tensor.data.dim() >= 2:
            std: float = gpt.config.init_method_std
            if tensor.key.endswith(INTO_THE_RESIDUAL_STREAM):
                std /= math.sqrt(2 * gpt.config.num_layers)
            _draw(tensor, std, seed)
            drawn += tensor.data.numel()
    assert drawn == sum(weight.numel() for weight in gpt.parameters() if weight.dim() >= 2), "a weight was not initialised"


def _draw(part: ShardedTensor, std: float, seed: int) -> None:
    """Fill the part of this rank of a matrix, or of a stack of matrices [..., rows, columns]."""
    *stack, rows, columns = part.local_shape
    *first, top, left = part.global_offset
    layers, start = first[: part.prepend_axis_num], first[part.prepend_axis_num :]
    generator = torch.Generator(device=part.data.device)
    for index in np.ndindex(*stack):
        place = [*layers, *(offset + i for offset, i in zip(start, index, strict=True))]
        generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{part.key}/{place}".encode()).digest()[:7]))
        whole = torch.randn(part.global_shape[-2:], generator=generator, device=part.data.device)
        part.data[index].copy_(whole[top : top + rows, left : left + columns] * std)
