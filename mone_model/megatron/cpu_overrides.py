"""Replacements for functions of Megatron-Core that are slow on CPUs; `cpu_support.TABLE` says what each one replaces.

`original` is the function that is replaced.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

Function = Callable[..., Any]


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits in fp32, and the largest of each row."""
    logits = logits.float()
    return logits, logits.amax(-1)  # torch.max finds their places too, and takes eight times as long


# To zero the gradients of experts and then add to the zeros takes two passes over the largest part of all memory. So of
# those that skip, the buffer keeps the last step's, and the first one writes over it (`kernels.cpu.experts`). Only of an
# expert that no backward pass reached it would still be the last step's when it is about to be reduced.
def zero_gradients(original: Function, buffer: Any) -> None:
    """Zero a buffer of gradients, unless the backward pass writes over all of them."""
    if not all(_is_written_over(weight) for weight in buffer.params):
        original(buffer)


def reduce_gradients(original: Function, buckets: Any, *args: Any, **options: Any) -> None:
    """Zero the gradients that no backward pass has written over, then reduce all."""
    for weight in buckets.params:
        if _is_written_over(weight) and not weight.grad_added_to_main_grad:
            weight.main_grad.zero_()
    original(buckets, *args, **options)


def _is_written_over(weight: torch.Tensor) -> bool:
    return getattr(weight, "gradient_is_written_over", False)


def norm(chunk_size: int, no_overflow: Any, tensor_lists: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
    """The L2 norm of all numbers of a list of tensors, fp32 [1]."""
    # Of millions of numbers at once torch's vector_norm is off by some 1e-4, and takes one thread.
    parts = []
    for gradient in tensor_lists[0]:
        flat = gradient.flatten()
        whole = len(flat) // 1024 * 1024
        parts += [torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1, dtype=torch.float32), flat[whole:]]
    return torch.linalg.vector_norm(torch.cat(parts), dtype=torch.float64).float().view(1), None


def copy_unless_same(original: Function, optimizer: Any) -> None:
    """Copy the main parameters to the weights of the model, if there are weights in 16 bits."""
    # The main parameters of fp32 weights are views of these.
    if any(optimizer.model_float16_groups):
        original(optimizer)


@contextlib.contextmanager
def coalesce_several(original: Function, group: Any = None, *args: Any, **options: Any) -> Iterator[Any]:
    """Combine the collectives of a block; in a group of one rank there are none."""
    if dist.get_world_size(group) > 1:
        with original(group, *args, **options) as work:
            yield work
    else:
        yield Finished()


def communicate_several(original: Function, *args: Any, group: Any = None, **options: Any) -> Any:
    """Call a collective, unless its group has one rank."""
    return original(*args, group=group, **options) if dist.get_world_size(group) > 1 else None


def all_reduce_several(
    original: Function, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Reduce a tensor in place, unless its group has one rank."""
    if dist.get_world_size(group) > 1:
        return original(tensor, op=op, group=group, async_op=async_op)
    return Finished() if async_op else None


class Finished:
    """The handle of a finished operation."""

    def wait(self) -> None:
        """Return at once."""
