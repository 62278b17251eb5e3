"""CPU replacements for slow functions of Megatron-Core.

    cpu_overrides.install()            # mone_model.megatron.prepare() calls it where there is no GPU

`install` names the function of Megatron-Core that each function here replaces.
"""

from typing import Any

import megatron.core.optimizer.clip_grads as clip_grads
import megatron.core.tensor_parallel.cross_entropy as cross_entropy
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup, _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def install() -> None:
    """Put these functions in the place of Megatron-Core's."""
    cross_entropy.VocabParallelCrossEntropy.calculate_logits_max = staticmethod(_largest)
    _ParamAndGradBuffer.reset = _zero_gradients
    _ParamAndGradBucketGroup.start_grad_sync = _reduce_gradients
    clip_grads.l2_norm_impl = _norm
    DistributedOptimizer._copy_main_params_to_model_params = _copy_unless_same


_zero_all, _reduce = _ParamAndGradBuffer.reset, _ParamAndGradBucketGroup.start_grad_sync
_copy_to_model = DistributedOptimizer._copy_main_params_to_model_params


def _largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    return logits, logits.amax(-1)  # torch.max finds their places too, and takes eight times as long


# To zero the gradients of experts and then add to the zeros takes two passes over the largest part of all memory. So of
# those that skip, the buffer keeps the last step's, and the first one writes over it (`kernels.cpu.experts`). Only of an
# expert that no backward pass reached it would still be the last step's when it is about to be reduced.
def _zero_gradients(buffer: Any) -> None:
    if not all(_is_written_over(weight) for weight in buffer.params):
        _zero_all(buffer)


def _reduce_gradients(buckets: Any, *args: Any, **options: Any) -> None:
    for weight in buckets.params:
        if _is_written_over(weight) and not weight.grad_added_to_main_grad:
            weight.main_grad.zero_()
    _reduce(buckets, *args, **options)


def _is_written_over(weight: torch.Tensor) -> bool:
    return getattr(weight, "gradient_is_written_over", False)


def _norm(chunk_size: int, no_overflow: Any, tensor_lists: list[list[torch.Tensor]], *_: Any) -> tuple[torch.Tensor, None]:
    # Of millions of numbers at once torch's vector_norm is off by some 1e-4, and takes one thread.
    parts = []
    for gradient in tensor_lists[0]:
        flat = gradient.flatten()
        whole = len(flat) // 1024 * 1024
        parts += [torch.linalg.vector_norm(flat[:whole].view(-1, 1024), dim=1, dtype=torch.float32), flat[whole:]]
    return torch.linalg.vector_norm(torch.cat(parts), dtype=torch.float64).float().view(1), None


def _copy_unless_same(optimizer: Any) -> None:
    # The main parameters of fp32 weights are views of these.
    if any(optimizer.model_float16_groups):
        _copy_to_model(optimizer)
