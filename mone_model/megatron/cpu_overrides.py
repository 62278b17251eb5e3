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
    """[..., V] -> the logits in fp32, and the largest of each row, [...]."""
    logits = logits.float()
    return logits, logits.amax(-1)


def zero_gradients(original: Function, buffer: Any) -> None:
    """Keep the last step's gradients of sparse experts: their first backward pass of a step overwrites them."""
    if not all(_is_written_over(weight) for weight in buffer.params):
        original(buffer)


def reduce_gradients(original: Function, buckets: Any, *args: Any, **options: Any) -> None:
    """Zero the gradients of sparse experts that no backward pass of this step overwrote; then reduce."""
    for weight in buckets.params:
        if _is_written_over(weight) and not weight.grad_added_to_main_grad:
            weight.main_grad.zero_()
    original(buckets, *args, **options)


def _is_written_over(weight: torch.Tensor) -> bool:
    return getattr(weight, "gradient_is_written_over", False)


def norm(chunk_size: int, no_overflow: Any, tensor_lists: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
    """The norm of all gradients together, fp32 [1], from the norms of blocks of 1024 numbers."""
    parts = []
    for gradient in tensor_lists[0]:
        flat = gradient.flatten()
        whole = len(flat) // 1024 * 1024
        parts += [torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1, dtype=torch.float32), flat[whole:]]
    return torch.linalg.vector_norm(torch.cat(parts), dtype=torch.float64).float().view(1), None


def copy_unless_same(original: Function, optimizer: Any) -> None:
    """Copy main parameters to 16-bit weights. Those of fp32 weights are views of the weights."""
    if any(optimizer.model_float16_groups):
        original(optimizer)


@contextlib.contextmanager
def coalesce_several(original: Function, group: Any = None, *args: Any, **options: Any) -> Iterator[Any]:
    """Coalesce the collectives of a group of several ranks."""
    if dist.get_world_size(group) > 1:
        with original(group, *args, **options) as work:
            yield work
    else:
        yield Finished()


def communicate_several(original: Function, *args: Any, group: Any = None, **options: Any) -> Any:
    """A collective whose output shares memory with its input, in a group of several ranks."""
    return original(*args, group=group, **options) if dist.get_world_size(group) > 1 else None


def all_reduce_several(
    original: Function, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """All-reduce in a group of several ranks."""
    if dist.get_world_size(group) > 1:
        return original(tensor, op=op, group=group, async_op=async_op)
    return Finished() if async_op else None


class Finished:
    """The handle of a finished operation."""

    def wait(self) -> None:
        """Return at once."""
