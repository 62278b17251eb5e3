"""Causal attention on CPUs, faster than torch's in training (docs/benchmarks.md).

    if cpu_attention.usable(q, k, v):
        context = cpu_attention.attend(q, k, v)

The source is csrc/attention.cpp. fp32, differentiable once. It saves the same tensors for the backward pass as torch.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu import library as cpu_library


def usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the kernel supports these tensors, and its threads, which compute whole groups, have nearly equal work."""
    tasks, threads = k.size(1) * k.size(2), torch.get_num_threads()
    return cpu_library.usable(q, k, v) and -(-tasks // threads) * threads <= 1.2 * tasks


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(c)) v, each query with the keys up to its own position.

    q: [s, B, heads, c]. k, v: [s, B, groups, c], of heads / groups heads each. Returns [s, B, heads, c].
    """
    return _attend(*(x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)))[0]


_attend = cpu_library.define("attend", "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)", differentiable=True)
_attend_backward = cpu_library.define(
    "attend_backward",
    "(Tensor dcontext, Tensor q, Tensor k, Tensor v, Tensor context, Tensor logsumexp) -> (Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("mone::attend")
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length, sequences, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(sequences, heads, length)


@torch.library.register_fake("mone::attend_backward")
def _(dcontext: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


@once_differentiable
def _differentiate(ctx: Any, dcontext: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if dcontext is None:
        return None, None, None
    return tuple(_attend_backward(dcontext.contiguous(), *ctx.saved_tensors))


torch.library.register_autograd("mone::attend", _differentiate, setup_context=_save)
