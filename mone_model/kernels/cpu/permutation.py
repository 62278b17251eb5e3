"""Tokens sorted by expert and back on the CPU, in one pass each way, for which torch needs a dozen operations.

    if cpu_library.usable(x, probs):
        rows, probs_of_rows, token_of_rows = cpu_permutation.permute(x, chosen, probs)
    x = cpu_permutation.unpermute(rows, token_of_rows, len(x))

The source is csrc/permutation.cpp. fp32, differentiable once.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mone_model.kernels.cpu.library import call


def permute(
    x_ND: torch.Tensor, chosen_NE: torch.Tensor, probs_NE: torch.Tensor | None
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """A copy of each token for each expert that it chose, expert by expert: rows [R, D], their weights and tokens [R].

    probs_NE: None if nobody asks for weights.
    """
    return _Permute.apply(x_ND, chosen_NE, probs_NE)


def unpermute(rows_RD: torch.Tensor, token_R: torch.Tensor, tokens: int) -> torch.Tensor:
    """[R, D] rows and whose they are -> [tokens, D]: of each token the sum of its rows."""
    return _Unpermute.apply(rows_RD, token_R, tokens)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, chosen: torch.Tensor, probs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        chosen = chosen.contiguous()
        rows = int(chosen.sum())
        token = chosen.new_empty(rows, dtype=torch.int64)
        probs_of_rows = None if probs is None else probs.new_empty(rows)
        call("list_rows", *chosen.shape, chosen, None if probs is None else probs.contiguous(), token, probs_of_rows)
        ctx.save_for_backward(chosen, token)
        ctx.mark_non_differentiable(token)
        return _taken(x, token), probs_of_rows, token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: torch.Tensor, dprobs_of_rows: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        chosen, token = ctx.saved_tensors
        dprobs = None
        if dprobs_of_rows is not None:
            dprobs = dprobs_of_rows.new_empty(chosen.shape)
            call("unlist_probs", *chosen.shape, chosen, dprobs_of_rows.contiguous(), dprobs)
        return _added(drows, token, len(chosen)), None, dprobs


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, token: torch.Tensor, tokens: int) -> torch.Tensor:
        ctx.save_for_backward(token)
        return _added(rows, token, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _taken(dx, *ctx.saved_tensors), None, None


def _taken(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    rows = x.new_empty(len(token), x.size(1))
    call("take_rows", *rows.shape, token, x.contiguous(), rows)
    return rows


def _added(rows: torch.Tensor, token: torch.Tensor, tokens: int) -> torch.Tensor:
    x = rows.new_empty(tokens, rows.size(1))
    call("add_rows", len(rows), *x.shape, token, rows.contiguous(), x)
    return x
