"""SwiGLU on the CPU in one pass each way, for which torch needs several operations and a copy.

    if cpu_library.usable(gate_up, dtypes=cpu_library.DTYPES):
        y = cpu_swiglu.swiglu(gate_up)                       # as Megatron-Core's bias_swiglu_impl

The source is csrc/swiglu.cpp. fp32 and bf16, differentiable once.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu.library import DTYPES, call


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (arXiv 2002.05202): [..., 2 H], gates before ups, -> [..., H]."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        gate_up = gate_up.contiguous()
        y = gate_up.new_empty(*gate_up.shape[:-1], gate_up.size(-1) // 2)
        call(f"swiglu_{DTYPES[y.dtype]}", *y.flatten(0, -2).shape, gate_up, y)
        ctx.save_for_backward(gate_up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        dgate_up = torch.empty_like(gate_up)
        call(f"swiglu_backward_{DTYPES[dy.dtype]}", *dy.flatten(0, -2).shape, dy.contiguous(), gate_up, dgate_up)
        return dgate_up
