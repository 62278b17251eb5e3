"""RMSNorm on the CPU in one pass each way, for which torch needs half a dozen operations.

    if cpu_library.usable(x, weight):
        y = cpu_rms_norm.rms_norm(x, weight, eps)            # as torch.nn.functional.rms_norm

The source is csrc/rms_norm.cpp. fp32, differentiable once.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu.library import define, rows_of


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: x [..., D], weight [D]."""
    return _rms_norm(rows_of(x), weight, eps)[0].view(x.shape)


_rms_norm = define("rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", differentiable=True)
_rms_norm_backward = define("rms_norm_backward", "(Tensor dy, Tensor x, Tensor weight, Tensor scales) -> (Tensor, Tensor)")


@torch.library.register_fake("mone::rms_norm")
def _(x: torch.Tensor, weight: Any, eps: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x))


@torch.library.register_fake("mone::rms_norm_backward")
def _(dy: torch.Tensor, x: Any, weight: torch.Tensor, scales: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(dy), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], output[1])


@once_differentiable
def _differentiate(ctx: Any, dy: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return None, None, None
    return *_rms_norm_backward(dy.contiguous(), *ctx.saved_tensors), None


torch.library.register_autograd("mone::rms_norm", _differentiate, setup_context=_save)
