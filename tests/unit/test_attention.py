import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from mone_model.attention import CoreAttention
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, transformer_config


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_the_formula(groups: int) -> None:
    model = ModelConfig(hidden_size=32, num_attention_heads=4, num_query_groups=groups)
    attention = CoreAttention(transformer_config(model, ParallelConfig(), ComputeConfig()), 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(7, 3, heads, 8, generator=generator).requires_grad_() for heads in (4, groups, groups))
    context = attention(q, k, v, None)

    precise = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    repeated = [tensor.repeat_interleave(4 // groups, dim=2) for tensor in precise[1:]]
    scores = torch.einsum("sbhc,tbhc->bhst", precise[0], repeated[0]) / 8**0.5
    later = torch.ones(7, 7, dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(later, -torch.inf).softmax(-1)
    expected = torch.einsum("bhst,tbhc->sbhc", probabilities, repeated[1]).flatten(2)
    torch.testing.assert_close(context.double(), expected, rtol=1e-5, atol=1e-6)
    target = torch.randn(expected.shape, generator=generator)
    gradients = torch.autograd.grad(context, [q, k, v], target)
    for actual, right in zip(gradients, torch.autograd.grad(expected, precise, target.double()), strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=1e-5, atol=1e-6)
