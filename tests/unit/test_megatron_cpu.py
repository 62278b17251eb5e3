"""CPU replacements, from RMSNorm to the gradient norm, compared with torch and Megatron-Core."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from mone_model.kernels.cpu import attention as cpu_attention
from mone_model.kernels.cpu import library as cpu_library
from mone_model.kernels.cpu import rms_norm as cpu_rms_norm
from mone_model.megatron.norms import RMSNorm
from mone_model.megatron.transformer_config import transformer_config
from tests.tiny import TINY_MODEL
from tests.unit.test_attention import formula

Layer = Callable[..., torch.Tensor]


def assert_equal(fast: Layer, reference: Layer, *inputs: torch.Tensor, threads: int, terms: int = 1) -> None:
    """Values and gradients of all inputs; the reference is computed in fp64.

    terms: of the longest sum. The rounding errors of a sum in order grow with the square root of their number.
    """
    tolerance = max(2e-6, torch.finfo(torch.float32).eps * terms**0.5)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y, expected = fast(*leaves), reference(*doubles)
    # Not contiguous, like the gradient from attention.
    target = torch.randn(y.shape[::-1], generator=torch.Generator().manual_seed(1)).permute(*range(y.dim() - 1, -1, -1))
    results = y, *torch.autograd.grad(y, leaves, target)
    torch.set_num_threads(before)
    for ours, theirs in zip(results, (expected, *torch.autograd.grad(expected, doubles, target.double())), strict=True):
        largest = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * largest)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 300),
    width=st.integers(8, 200),
    more=st.integers(0, 9),
    threads=st.sampled_from([1, 2, 7]),
)
def test_rms_norm_equals_its_formula(seed: int, rows: int, width: int, more: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, width + more, generator=generator)[:, :, :width]  # rows with gaps in memory
    weight = torch.randn(width, generator=generator)
    assert_equal(
        lambda x, weight: cpu_rms_norm.rms_norm(x, weight, 1e-5),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight,
        x,
        weight,
        threads=threads,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_layers_are_the_same_with_and_without_the_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformer_config(ModelConfig(**TINY_MODEL), ParallelConfig(), ComputeConfig())
    norm = RMSNorm(config, 32).to(dtype)
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    by_kernel = norm(x)
    monkeypatch.setattr(cpu_library, "allowed", False)
    torch.testing.assert_close(norm(x), by_kernel)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.one_of(st.integers(1, 100), st.integers(380, 800)),  # long sequences have several chunks of keys
    groups=st.integers(1, 3),
    heads_of_group=st.integers(1, 3),
    width=st.integers(8, 70),
    more=st.integers(0, 9),
    threads=st.sampled_from([1, 2, 7]),
)
def test_attention_equals_its_formula(
    seed: int, length: int, groups: int, heads_of_group: int, width: int, more: int, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = heads_of_group * groups
    q, k, v = (torch.randn(length, 2, n, width + more, generator=generator)[..., :width] for n in (heads, groups, groups))
    # Small values, so that gradients of queries are not small differences of large sums.
    # The gradients of a key and its value are sums over all queries of its heads.
    assert_equal(cpu_attention.attend, formula, q, k, v / width**0.5, threads=threads, terms=length * heads_of_group)


def test_the_loss_starts_from_the_largest_logits() -> None:
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    logits = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 7], logits[1, 1, 3] = torch.nan, torch.inf
    same, largest = VocabParallelCrossEntropy.calculate_logits_max(logits)
    assert same is logits
    torch.testing.assert_close(largest, logits.max(-1).values, equal_nan=True, rtol=0, atol=0)


def test_the_norm_of_many_gradients_is_exact(one_process: None) -> None:
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in ((1,), (5000,), (2**22 + 7,), (3, 1024))]
    norm = get_grad_norm_fp32(gradients)
    assert norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).double().norm().item(), rel=2e-7)
