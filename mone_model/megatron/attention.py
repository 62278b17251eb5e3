"""Attention that does not store the scores of a sequence: by a kernel of ours on CPUs, otherwise by torch."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from mone_model.kernels.cpu import attention as cpu_attention


class CoreAttention(MegatronModule):
    """Causal attention of the heads of this tensor-parallel rank.

    It replaces Megatron-Core's DotProductAttention, which stores scores and probabilities.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str, **_: Any
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None = None,
        *,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **_: Any,
    ) -> torch.Tensor:
        """[s, b, heads, c] queries, [s, b, groups, c] keys and values -> [s, b, heads * c]."""
        assert attention_mask is None, "only causal attention is supported"
        assert attn_mask_type == AttnMaskType.causal
        dropout = self.dropout if self.training else 0.0
        if dropout == 0 and cpu_attention.usable(query, key, value):
            return cpu_attention.attend(query, key, value).flatten(2)
        # As in DotProductAttention: ranks with different heads need different dropout masks.
        forking = dropout > 0 and not self.config.sequence_parallel
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        with tensor_parallel.get_cuda_rng_tracker().fork() if forking else contextlib.nullcontext():
            context = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.size(1) != k.size(1)
            )
        return context.permute(2, 0, 1, 3).flatten(2)
