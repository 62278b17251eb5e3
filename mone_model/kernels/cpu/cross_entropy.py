"""Cross-entropy on the CPU in two passes over the logits, for which Megatron-Core needs eight.

    if cpu_cross_entropy.usable(logits):
        loss = cpu_cross_entropy.cross_entropy(logits, targets, group)    # as vocab_parallel_cross_entropy

The source is csrc/cross_entropy.cpp. fp32, differentiable once.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu import library as cpu_library
from mone_model.kernels.cpu.library import call


def usable(logits: torch.Tensor) -> bool:
    """Whether `cross_entropy` can be used for these logits here."""
    return logits.size(-1) % 16 == 0 and logits.numel() > 0 and logits.is_contiguous() and cpu_library.usable(logits)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """log(sum(exp(logits))) - logits[target], over the vocabulary.

    logits: [..., V] of the tokens of this rank: those of `group` share the vocabulary, in their order. The backward pass
    leaves their gradient in their place. targets: [...] int64 -> [...] losses.
    """
    return _CrossEntropy.apply(logits, targets, group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        rows, vocabulary = targets.numel(), logits.size(-1)
        targets, first = targets.contiguous(), group.rank() * vocabulary
        largest, sums, chosen = (logits.new_empty(targets.shape) for _ in range(3))
        call("cross_entropy", rows, vocabulary, logits, targets, first, largest, sums, chosen)
        if group.size() > 1:
            of_all = largest.clone()
            dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=group)
            sums *= (largest - of_all).exp()
            largest = of_all
            for share in (sums, chosen):
                dist.all_reduce(share, group=group)
        log_sums = largest + sums.log()
        ctx.save_for_backward(logits, targets, log_sums)
        ctx.first = first
        return log_sums - chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets, log_sums = ctx.saved_tensors
        call(
            "cross_entropy_backward", targets.numel(), logits.size(-1), logits, targets, ctx.first, log_sums,
            dloss.contiguous(),
        )  # fmt: skip
        return logits, None, None
