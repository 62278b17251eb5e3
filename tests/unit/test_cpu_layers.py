"""RMSNorm and rotary embeddings on the CPU against torch's operations in fp64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mone_model.kernels import cpu_layers

Layer = Callable[..., torch.Tensor]


def assert_equal(fast: Layer, reference: Layer, *inputs: torch.Tensor) -> None:
    """Values and gradients of all inputs; the reference is computed in fp64."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y, expected = fast(*leaves), reference(*doubles)
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    results = y, *torch.autograd.grad(y, leaves, target)
    for ours, theirs in zip(results, (expected, *torch.autograd.grad(expected, doubles, target.double())), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6 * max(1.0, theirs.abs().max().item()))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 300), width=st.integers(8, 200), more=st.integers(0, 9))
def test_rms_norm_equals_its_formula(seed: int, rows: int, width: int, more: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, width + more, generator=generator)[:, :, :width]  # rows that lie apart
    weight = torch.randn(width, generator=generator)
    assert_equal(
        lambda x, weight: cpu_layers.rms_norm(x, weight, 1e-5),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight,
        x,
        weight,
    )


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 40), half=st.integers(1, 70), more=st.integers(0, 9))
def test_rotation_turns_pairs_by_their_angle(seed: int, length: int, half: int, more: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, 2, 3, 2 * half + more, generator=generator)[..., : 2 * half]
    angles = 10 * torch.randn(length, 1, 1, half, generator=generator).repeat(1, 1, 1, 2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.complex(*x.chunk(2, dim=-1))
        turned = pairs * torch.polar(torch.ones(1, dtype=torch.double), angles[..., :half].double())
        return torch.cat([turned.real, turned.imag], dim=-1)

    assert_equal(lambda x: cpu_layers.rotate(x, angles), turn, x)


@pytest.mark.parametrize(
    ("options", "rotated"),
    [({}, 32), ({"mscale": 1.5}, 32), ({"rotary_interleaved": True}, 32), ({}, 16)],
    ids=["plain", "scaled", "interleaved", "half of a head"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_megatron_core_rotates_the_same_with_and_without_the_kernel(
    options: dict[str, object], rotated: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.models.common.embeddings import rope_utils  # after mone_model, which prepares torch.compile

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 2, 3, 32, generator=generator).to(dtype)
    angles = torch.randn(24, 1, 1, rotated // 2, generator=generator).repeat(1, 1, 1, 2)
    results = [rope_utils._apply_rotary_pos_emb_bshd(x, angles, **options)]
    monkeypatch.setattr(cpu_layers, "usable", lambda x: False)
    results.append(rope_utils._apply_rotary_pos_emb_bshd(x, angles, **options))
    torch.testing.assert_close(*results)
