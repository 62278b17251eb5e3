"""What is computed otherwise on CPUs, RMSNorm, rotary embeddings and the largest logits, against torch's operations."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, transformer_config
from mone_model.kernels import cpu_library, cpu_rms_norm, cpu_rotary
from mone_model.layer_spec import RMSNorm
from tests.tiny import TINY_MODEL

Layer = Callable[..., torch.Tensor]


def assert_equal(fast: Layer, reference: Layer, *inputs: torch.Tensor, threads: int) -> None:
    """Values and gradients of all inputs; the reference is computed in fp64."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    y, expected = fast(*leaves), reference(*doubles)
    # As the backward pass of attention gives it: not contiguous.
    target = torch.randn(y.shape[::-1], generator=torch.Generator().manual_seed(1)).permute(*range(y.dim() - 1, -1, -1))
    results = y, *torch.autograd.grad(y, leaves, target)
    torch.set_num_threads(before)
    for ours, theirs in zip(results, (expected, *torch.autograd.grad(expected, doubles, target.double())), strict=True):
        largest = max([1.0, *theirs.abs().flatten().tolist()])
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6 * largest)


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
    x = torch.randn(rows, 3, width + more, generator=generator)[:, :, :width]  # rows that lie apart
    weight = torch.randn(width, generator=generator)
    assert_equal(
        lambda x, weight: cpu_rms_norm.rms_norm(x, weight, 1e-5),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight,
        x,
        weight,
        threads=threads,
    )


@pytest.mark.parametrize(("dtype", "by_kernel"), [(torch.float32, True), (torch.bfloat16, False)])
def test_norms_of_layers_are_the_same_with_and_without_the_kernel(
    dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformer_config(ModelConfig(**TINY_MODEL), ParallelConfig(), ComputeConfig())
    norm = RMSNorm(config, 32).to(dtype)
    x = torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    kernel = mock.Mock(wraps=cpu_rms_norm.rms_norm)
    monkeypatch.setattr(cpu_rms_norm, "rms_norm", kernel)
    results = [norm(x)]
    assert kernel.called == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors: False)
    torch.testing.assert_close(norm(x), results[0])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.integers(1, 80),
    half=st.integers(1, 70),
    more=st.integers(0, 9),
    threads=st.sampled_from([1, 2, 7]),
)
def test_rotation_turns_pairs_by_their_angle(seed: int, length: int, half: int, more: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, 2, 3, 2 * half + more, generator=generator)[..., : 2 * half]
    angles = 10 * torch.randn(length, 1, 1, half, generator=generator).repeat(1, 1, 1, 2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1))
        turned = pairs * torch.polar(torch.ones(1, dtype=torch.double), angles[..., :half].double())
        return torch.cat([turned.real, turned.imag], dim=-1)

    assert_equal(lambda x: cpu_rotary.rotate(x, angles), turn, x, threads=threads)


@pytest.mark.parametrize(
    ("options", "rotated", "dtype", "by_kernel"),
    [
        ({"rotary_interleaved": False, "mscale": 1.0}, 32, torch.float32, True),
        ({"mscale": 1.5}, 32, torch.float32, False),
        ({"rotary_interleaved": True}, 32, torch.float32, False),
        ({}, 16, torch.float32, False),
        ({}, 32, torch.bfloat16, False),
    ],
    ids=["plain", "scaled", "interleaved", "half of a head", "bf16"],
)
def test_megatron_core_rotates_the_same_with_and_without_the_kernel(
    options: dict[str, object], rotated: int, dtype: torch.dtype, by_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.common.embeddings import rope_utils  # after mone_model, which prepares torch.compile

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 2, 3, 32, generator=generator).to(dtype)
    angles = torch.randn(24, 1, 1, rotated // 2, generator=generator).repeat(1, 1, 1, 2)
    kernel = mock.Mock(wraps=cpu_rotary.rotate)
    monkeypatch.setattr(cpu_rotary, "rotate", kernel)
    results = [rope_utils._apply_rotary_pos_emb_bshd(x, angles, **options)]
    assert kernel.called == by_kernel
    monkeypatch.setattr(cpu_library, "usable", lambda *tensors: False)
    results.append(rope_utils._apply_rotary_pos_emb_bshd(x, angles, **options))
    torch.testing.assert_close(*results)


def test_the_loss_starts_from_the_largest_logits() -> None:
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    logits = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 7], logits[1, 1, 3] = torch.nan, torch.inf
    same, largest = VocabParallelCrossEntropy.calculate_logits_max(logits)
    assert same is logits
    torch.testing.assert_close(largest, logits.max(-1).values, equal_nan=True, rtol=0, atol=0)
