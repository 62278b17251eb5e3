"""The router's choice on the CPU in one pass each way, for which torch needs a dozen operations on tiny rows.

    if cpu_library.usable(logits):
        scores, chosen = cpu_router.route(logits, k, over_all=False)    # softmax of the k best, and which they are

The source is csrc/router.cpp. fp32, differentiable once.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu.library import call


def route(logits: torch.Tensor, k: int, *, over_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, E] logits -> [N, E] scores and [N, E] bool, the k largest of each row, the first among equals.

    The scores are the softmax over the chosen, 0 for the others; over_all: over all experts.
    """
    return _Route.apply(logits, k, over_all)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, k: int, over_all: bool) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.contiguous()
        scores, chosen = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.bool)
        call("route", *logits.shape, k, over_all, logits, scores, chosen)
        ctx.save_for_backward(scores)
        ctx.mark_non_differentiable(chosen)
        return scores, chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dscores: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None]:
        (scores,) = ctx.saved_tensors
        dlogits = torch.empty_like(scores)
        call("route_backward", *scores.shape, scores, dscores.contiguous(), dlogits)
        return dlogits, None, None
