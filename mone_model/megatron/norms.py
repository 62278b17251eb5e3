"""RMSNorms of the local layers, and of queries or keys over all heads together.

layer.submodules.input_layernorm = RMSNorm                       # in a Megatron-Core layer spec
attention.q_layernorm, attention.k_layernorm = QueryNorm, KeyNorm

Shapes: s sequence, b batch, D width, n heads of this tensor-parallel rank, c channels of a head.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.autograd.function import once_differentiable

from mone_model.megatron.cpu_support import current_device


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with sequence parallelism, which Megatron-Core's lacks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, device=current_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ProjectionNorm(torch.nn.Module):
    """RMSNorm over all heads of a token together, whose heads tensor-parallel ranks share; OLMoE, arXiv 2409.02060.

        y = x / sqrt(mean(x^2) + eps) * weight           mean over the heads of all ranks

    Each rank has the weights of its heads. Megatron-Core's `qk_layernorm` must be off: it would add up their gradients.
    """

    def __init__(self, config: TransformerConfig, heads: int, channels: int, eps: float) -> None:
        super().__init__()
        group = parallel_state.get_tensor_model_parallel_group()
        self.group = group if group.size() > 1 else None
        self.width, self.eps = heads * channels, eps
        options: dict[str, Any] = {"dtype": config.params_dtype, "device": current_device()}
        self.weight = torch.nn.Parameter(torch.ones(self.width // group.size(), **options))
        # Else the gradient norm takes the weights of one rank only.
        set_tensor_model_parallel_attributes(tensor=self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x_SBNC: torch.Tensor) -> torch.Tensor:
        """[s, b, n, c] -> [s, b, n, c]."""
        x = x_SBNC.flatten(-2)
        if self.group is not None:
            y: torch.Tensor = _SharedRMSNorm.apply(x, self.weight, self.width, self.eps, self.group)
        else:
            y = torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return y.view(x_SBNC.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """The weight is split over tensor-parallel ranks."""
        state: dict[str, ShardedTensor] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )
        return state


class QueryNorm(ProjectionNorm):
    """Of the queries; hidden_size: channels of one head."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, config.num_attention_heads, hidden_size, eps)


class KeyNorm(ProjectionNorm):
    """Of the keys; hidden_size: channels of one head."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, config.num_query_groups, hidden_size, eps)


class _SharedRMSNorm(torch.autograd.Function):
    """RMSNorm of rows [..., W] of which this rank has [..., W / ranks].

    With r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight:  dx = r g - x r^3 mean(g x),  dweight = sum of dy x r
    over the rows. The two means are over the rows of all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, width: int, eps: float, group: Any) -> torch.Tensor:
        numbers = x.float()
        square = numbers.square().sum(-1, keepdim=True)
        dist.all_reduce(square, group=group)
        scale = torch.rsqrt(square / width + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.width, ctx.group = width, group
        return (numbers * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        numbers, gradient = x.float(), dy.float() * weight.float()
        product = (gradient * numbers).sum(-1, keepdim=True)
        dist.all_reduce(product, group=ctx.group)
        dx = scale * gradient - numbers * scale.pow(3) * (product / ctx.width)
        dweight = (dy.float() * numbers * scale).flatten(0, -2).sum(0)
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None, None
