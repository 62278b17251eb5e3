"""Rotary position embeddings on the CPU in one pass, for which torch needs a dozen operations.

    if cpu_library.usable(x, angles):
        y = cpu_rotary.rotate(x, angles)                     # as Megatron-Core's apply_rotary_pos_emb

The source is csrc/rotary.cpp. fp32, differentiable once.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu.library import call


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn each pair of numbers by the angle of its position (RoPE, arXiv 2104.09864): j and j + c/2 are a pair.

    x: [s, B, heads, c]. angles: [s, 1, 1, c], the second half as the first.
    """
    angles = angles.flatten(0, -2)[:, : x.size(-1) // 2].contiguous()
    return _Rotation.apply(x, angles.cos(), angles.sin())


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(dy, cosines, -sines), None, None


def _rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    x, y = x if x.stride(3) == 1 else x.contiguous(), x.new_empty(x.shape)
    call("rotate", *x.shape, x, *x.stride()[:3], cosines, sines, y)
    return y
