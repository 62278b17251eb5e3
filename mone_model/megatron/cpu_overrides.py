"""Make Megatron-Core on CPUs not slower than it must be: what torch computes slowly there, and needless passes over memory.

    megatron_cpu_speed.install()       # mone_model's __init__ does, by megatron_cpu, where there is no GPU

Each function here takes the place of one of Megatron-Core's, named beside it in `install`, and leaves to it what the
kernels of `mone_model.kernels` do not do.
"""

from typing import Any

import megatron.core.models.common.embeddings.rope_utils as rope_utils
import megatron.core.optimizer.clip_grads as clip_grads
import megatron.core.tensor_parallel.cross_entropy as cross_entropy
import megatron.core.transformer.mlp as mlp
import megatron.core.transformer.moe.router as router
import megatron.core.transformer.moe.token_dispatcher as dispatcher
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup, _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.parallel_state import get_tensor_model_parallel_group

from mone_model.kernels.cpu import cross_entropy as cpu_cross_entropy
from mone_model.kernels.cpu import library as cpu_library
from mone_model.kernels.cpu import permutation as cpu_permutation
from mone_model.kernels.cpu import rotary as cpu_rotary
from mone_model.kernels.cpu import router as cpu_router
from mone_model.kernels.cpu import swiglu as cpu_swiglu


def install() -> None:
    """Put these functions in the place of Megatron-Core's."""
    rope_utils._apply_rotary_pos_emb_bshd = _rotate
    router.topk_routing_with_score_function = _route
    router.compute_routing_scores_for_aux_loss = _score_for_aux_loss
    mlp.bias_swiglu_impl = _swiglu
    dispatcher.permute, dispatcher.unpermute = _permute, _unpermute
    cross_entropy._VocabParallelCrossEntropy = _CrossEntropy
    cross_entropy.VocabParallelCrossEntropy.calculate_logits_max = staticmethod(_largest)
    _ParamAndGradBuffer.reset = _zero_gradients
    _ParamAndGradBucketGroup.start_grad_sync = _reduce_gradients
    clip_grads.l2_norm_impl = _norm
    DistributedOptimizer._copy_main_params_to_model_params = _copy_unless_same


_rotate_by_torch = rope_utils._apply_rotary_pos_emb_bshd
_route_by_torch = router.topk_routing_with_score_function
_score_for_aux_loss_by_torch = router.compute_routing_scores_for_aux_loss
_swiglu_by_torch = mlp.bias_swiglu_impl
_permute_by_torch, _unpermute_by_torch = dispatcher.permute, dispatcher.unpermute
_cross_entropy_by_torch = cross_entropy._VocabParallelCrossEntropy
_zero_all, _reduce = _ParamAndGradBuffer.reset, _ParamAndGradBucketGroup.start_grad_sync
_copy_to_model = DistributedOptimizer._copy_main_params_to_model_params


def _rotate(x: torch.Tensor, angles: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    plain = not any(args) and not _given(
        {name: option for name, option in options.items() if (name, option) != ("mscale", 1.0)}
    )
    one_each = x.dim() == 4 and angles.shape == (len(x), 1, 1, x.size(3))
    if plain and one_each and x.numel() > 0 and cpu_library.usable(x, angles):
        return cpu_rotary.rotate(x, angles)
    return _rotate_by_torch(x, angles, *args, **options)


def _route(
    logits: torch.Tensor,
    topk: int,
    *,
    use_pre_softmax: bool = False,
    scaling_factor: float | None = None,
    score_function: str = "softmax",
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    if score_function == "softmax" and not _given(options) and cpu_library.usable(logits):
        scores, chosen = cpu_router.route(logits, topk, over_all=use_pre_softmax)
        scores = scores * chosen if use_pre_softmax else scores
        return scores if scaling_factor is None else scores * scaling_factor, chosen
    options |= {"use_pre_softmax": use_pre_softmax, "scaling_factor": scaling_factor, "score_function": score_function}
    return _route_by_torch(logits, topk, **options)


def _score_for_aux_loss(
    logits: torch.Tensor, topk: int, score_function: str, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    if score_function == "softmax" and not _given(options) and cpu_library.usable(logits):
        scores, chosen = cpu_router.route(logits, topk, over_all=True)
        return chosen, scores
    return _score_for_aux_loss_by_torch(logits, topk, score_function, **options)


def _swiglu(gate_up: torch.Tensor, bias: torch.Tensor | None, *options: bool) -> torch.Tensor:
    if bias is None and not any(options) and cpu_library.usable(gate_up, dtypes=cpu_library.DTYPES):
        return cpu_swiglu.swiglu(gate_up)
    return _swiglu_by_torch(gate_up, bias, *options)


def _permute(
    tokens: torch.Tensor, routing_map: torch.Tensor, *, probs: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    # The number of rows is found in the map.
    if not _given(options | {"num_out_tokens": None}) and cpu_library.usable(tokens, *([] if probs is None else [probs])):
        return cpu_permutation.permute(tokens, routing_map.bool(), probs)
    return _permute_by_torch(tokens, routing_map, probs=probs, **options)


def _unpermute(
    permuted: torch.Tensor, sorted_indices: torch.Tensor, *, restore_shape: torch.Size, **options: Any
) -> torch.Tensor:
    # The routing map is of no use without weights.
    if not _given(options | {"routing_map": None}) and cpu_library.usable(permuted):
        return cpu_permutation.unpermute(permuted, sorted_indices, restore_shape[0])
    return _unpermute_by_torch(permuted, sorted_indices, restore_shape, **options)


class _CrossEntropy:
    @staticmethod
    def apply(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        if label_smoothing == 0 and cpu_cross_entropy.usable(logits):
            return cpu_cross_entropy.cross_entropy(logits, targets, get_tensor_model_parallel_group())
        return _cross_entropy_by_torch.apply(logits, targets, label_smoothing)


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


def _given(options: dict[str, Any]) -> bool:
    """Whether any asks for something."""
    return any(option is not None and option is not False for option in options.values())
