"""Causal attention on the CPU, faster than torch's where a processor trains (docs/benchmarks.md).

    if cpu_attention.usable(q, k, v):
        context = cpu_attention.attend(q, k, v)

The source is csrc/attention.cpp. fp32, differentiable once. It keeps for the backward pass what torch keeps.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu import library as cpu_library


def usable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether these can be attended here, and threads, each with whole groups of sequences, share the work evenly enough."""
    tasks, threads = k.size(1) * k.size(2), torch.get_num_threads()
    return cpu_library.usable(q, k, v) and -(-tasks // threads) * threads <= 1.2 * tasks


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(c)) v, each query with the keys up to its own position.

    q: [s, B, heads, c]. k, v: [s, B, groups, c], of heads / groups heads each. Returns [s, B, heads, c].
    """
    assert k.shape == v.shape, (k.shape, v.shape)
    assert q.shape == (*k.shape[:2], q.size(2), k.size(3)), (q.shape, k.shape)
    assert q.size(2) % k.size(2) == 0, (q.shape, k.shape)
    return _Attention.apply(*(x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        length, sequences, heads, _ = q.shape
        context, logsumexp = q.new_empty(q.shape), q.new_empty(sequences, heads, length)
        cpu_library.call("attend", *_described(q, k, v), context, logsumexp)
        ctx.save_for_backward(q, k, v, context, logsumexp)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcontext: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, context, logsumexp = ctx.saved_tensors
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
        described = _described(q, k, v)
        cpu_library.call("attend_backward", *described, context, logsumexp, dcontext.contiguous(), *gradients)
        return gradients


def _described(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[Any]:
    """Shapes, the factor of scores, and where the numbers lie."""
    length, sequences, heads, width = q.shape
    places = [part for x in (q, k, v) for part in (x, *x.stride()[:3])]
    return [length, sequences, heads, k.size(2), width, width**-0.5, *places]
