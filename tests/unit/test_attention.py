from unittest import mock

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.kernels.cpu import attention as cpu_attention
from mone_model.kernels.cpu import library as cpu_library
from mone_model.megatron.attention import CoreAttention
from mone_model.megatron.transformer_config import transformer_config

pytestmark = pytest.mark.usefixtures("one_process")


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention; q: [s, B, heads, c], k and v: [s, B, groups, c]."""
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("sbhc,tbhc->bhst", q, k) / q.size(3) ** 0.5
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("bhst,tbhc->sbhc", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def attention_of(groups: int = 2, dropout: float = 0.0) -> CoreAttention:
    model = ModelConfig(hidden_size=32, num_attention_heads=4, num_query_groups=groups, attention_dropout=dropout)
    return CoreAttention(transformer_config(model, ParallelConfig(), ComputeConfig()), 1, AttnMaskType.causal, "self")


def queries_keys_values(groups: int = 2, length: int = 7) -> list[torch.Tensor]:
    """Inputs with different memory layouts."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, length, 8, generator=generator) for heads in (4, groups, groups))
    return [
        x.requires_grad_()
        for x in (
            q.permute(2, 0, 1, 3).contiguous(),
            k.permute(2, 0, 1, 3),
            v.permute(2, 1, 0, 3).contiguous().transpose(1, 2),
        )
    ]


def assert_is_the_formula(
    context: torch.Tensor, qkv: list[torch.Tensor], atol: float = 1e-6, of_gradients: float = 1e-6
) -> None:
    """Output and gradients equal those of the formula."""
    precise = [tensor.detach().double().requires_grad_() for tensor in qkv]
    expected = formula(*precise)
    context = context.view(expected.shape)
    torch.testing.assert_close(context.double(), expected, rtol=1e-5, atol=atol)
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(context, qkv, target, retain_graph=True)
    for actual, right in zip(gradients, torch.autograd.grad(expected, precise, target.double()), strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=1e-5, atol=of_gradients)


# The longer sequence has several chunks of keys. Gradients of keys are sums over up to 3600 queries.
@pytest.mark.parametrize(("length", "of_gradients"), [(7, 1e-6), (900, 5e-6)])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_the_formula(groups: int, length: int, of_gradients: float) -> None:
    qkv = queries_keys_values(groups, length)
    assert_is_the_formula(attention_of(groups)(*qkv, None), qkv, of_gradients=of_gradients)


@pytest.mark.parametrize("important", [slice(0, 450), slice(450, 900)])
def test_keys_can_be_masked(important: slice) -> None:
    q, k, v = queries_keys_values(length=900)
    with torch.no_grad():
        q[..., 0] = 30.0
        k[..., 0] = -30.0
        k[important, ..., 0] = 0.0
    context = attention_of()(q, k, v, None)
    # Scores of 318 are rounded to 3e-5; gradients of queries and keys are products with each other.
    assert_is_the_formula(context, [q, k, v], atol=1e-4, of_gradients=1e-3)
    if important.start == 0:  # avoids slow denormal numbers
        assert torch.all(torch.autograd.grad(context.sum(), v)[0][450:] == 0)


@pytest.mark.parametrize("length", [64, 900])
def test_large_scores_do_not_overflow(length: int) -> None:
    q, k, v = queries_keys_values(length=length)
    with torch.no_grad():
        q[..., 0], k[..., 0] = 38.0, 38.0  # scores of 500
        v[:] = 1.0
    context = attention_of()(q, k, v, None)
    torch.testing.assert_close(context, torch.ones_like(context), rtol=0, atol=2e-6)
    dq, dk = torch.autograd.grad(context, [q, k], torch.ones_like(context))
    for gradient in (dq, dk):  # both are products of 38 and rounding errors
        assert gradient.abs().max() < 2e-3


def test_nan_propagates() -> None:
    q, k, v = queries_keys_values(length=900)
    with torch.no_grad():
        k[100, 1, 0, 3] = torch.nan
        v[500, 2, 1, 4] = torch.nan
    context = attention_of()(q, k, v, None).view(900, 3, 4, 8)
    assert context[100:, 1, :2].isnan().all()
    assert context[500:, 2, 2:, 4].isnan().all()
    dq = torch.autograd.grad(context, q, torch.ones_like(context))[0]
    assert dq[100:, 1, :2].isnan().all()
    assert not dq[:, 0].isnan().any()


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [
        (torch.float32, 6),
        (torch.float32, 4),  # six groups of sequences are not divided among four evenly
        (torch.float32, 8),
        (torch.bfloat16, 1),
    ],
)
def test_is_the_same_with_and_without_the_kernel(dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [*(x.to(dtype) for x in queries_keys_values()), None]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    context = attention_of()(*inputs)
    monkeypatch.setattr(cpu_library, "allowed", False)
    torch.testing.assert_close(attention_of()(*inputs), context)


def test_dropout_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "attend", mock.Mock(side_effect=AssertionError))
    q, k, v = queries_keys_values()
    attention = attention_of(dropout=0.5)
    ones = attention(q, k, torch.ones_like(v), None)
    assert ones.std() > 0.1
    monkeypatch.undo()
    torch.testing.assert_close(attention.eval()(q, k, torch.ones_like(v), None), torch.ones_like(ones))
