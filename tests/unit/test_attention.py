from unittest import mock

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from mone_model.attention import CoreAttention
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, transformer_config
from mone_model.kernels import cpu_attention, cpu_library

pytestmark = pytest.mark.usefixtures("one_process")


def attention_of(groups: int = 2, dropout: float = 0.0) -> CoreAttention:
    model = ModelConfig(hidden_size=32, num_attention_heads=4, num_query_groups=groups, attention_dropout=dropout)
    return CoreAttention(transformer_config(model, ParallelConfig(), ComputeConfig()), 1, AttnMaskType.causal, "self")


def queries_keys_values(groups: int = 2, queries: int = 7, size: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, 3, heads, 8, generator=generator) for heads in (4, groups, groups))
    return [x.requires_grad_() for x in (size * q[:queries], k, v)]


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_the_formula(groups: int, size: float) -> None:
    q, k, v = queries_keys_values(groups, size=size)
    context = attention_of(groups)(q, k, v, None)

    precise = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    repeated = [tensor.repeat_interleave(4 // groups, dim=2) for tensor in precise[1:]]
    scores = torch.einsum("sbhc,tbhc->bhst", precise[0], repeated[0]) / 8**0.5
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)
    expected = torch.einsum("bhst,tbhc->sbhc", probabilities, repeated[1]).flatten(2)
    torch.testing.assert_close(context.double(), expected, rtol=1e-5, atol=1e-6 * size)
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(context, [q, k, v], target)
    for actual, right in zip(gradients, torch.autograd.grad(expected, precise, target.double()), strict=True):
        # Those of keys grow with the queries, and the rounding of probabilities with the scores.
        torch.testing.assert_close(actual.double(), right, rtol=1e-5, atol=1e-6 * size**2)


@pytest.mark.parametrize(
    ("dtype", "threads", "mask", "by_kernel"),
    [
        (torch.float32, 6, AttnMaskType.causal, True),
        (torch.float32, 7, AttnMaskType.causal, False),  # more than groups in all sequences
        (torch.float32, 1, AttnMaskType.no_mask, False),
        (torch.bfloat16, 1, AttnMaskType.causal, False),
    ],
)
def test_is_the_same_with_and_without_the_kernel(
    dtype: torch.dtype, threads: int, mask: AttnMaskType, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [x.to(dtype) for x in queries_keys_values(queries=1 if mask == AttnMaskType.no_mask else 7)]
    kernel = mock.Mock(wraps=cpu_attention.attend)
    monkeypatch.setattr(cpu_attention, "attend", kernel)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    context = attention_of()(*inputs, None, attn_mask_type=mask)
    assert kernel.called == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors: False)
    torch.testing.assert_close(attention_of()(*inputs, None, attn_mask_type=mask), context)


def test_dropout_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "attend", mock.Mock(side_effect=AssertionError))
    q, k, v = queries_keys_values()
    attention = attention_of(dropout=0.5)
    ones = attention(q, k, torch.ones_like(v), None)
    assert ones.std() > 0.1
    monkeypatch.undo()
    torch.testing.assert_close(attention.eval()(q, k, torch.ones_like(v), None), torch.ones_like(ones))
