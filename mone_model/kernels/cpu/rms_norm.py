"""RMSNorm on the CPU in one pass each way, for which torch needs half a dozen operations.

    if cpu_library.usable(x, weight):
        y = cpu_rms_norm.rms_norm(x, weight, eps)            # as torch.nn.functional.rms_norm

The source is csrc/rms_norm.cpp. fp32, differentiable once.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu.library import call, rows_of


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: x [..., D], weight [D]."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows, y = rows_of(x), x.new_empty(x.shape)
        scales = x.new_empty(len(rows))
        call("rms_norm", *rows.shape, rows, rows.stride(0), weight, eps, y, scales)
        ctx.save_for_backward(rows, weight, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, weight, scales = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dweight = torch.empty_like(dy), torch.empty_like(weight)
        call("rms_norm_backward", *rows.shape, dy, rows, rows.stride(0), weight, scales, dx, dweight)
        return dx, dweight, None
