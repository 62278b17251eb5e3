"""Matrix products with oneDNN instead of MKL: equal results for all strides, and only when enabled."""

from collections.abc import Iterator

import pytest
import torch

from mone_model.megatron import cpu_gemm


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """oneDNN's products, on any processor."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    before = bool(cpu_gemm._replacing)
    monkeypatch.setattr(cpu_gemm, "_mkl_is_slow", lambda: True)
    cpu_gemm.install()
    yield
    cpu_gemm.remove()
    monkeypatch.undo()
    if before:
        cpu_gemm.install()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


MATRICES = {
    "rows": (random(150, 200), random(200, 120)),
    "columns": (random(200, 150).T, random(120, 200).T),
    "parts of wider ones": (random(150, 400)[:, 100:300], random(200, 360)[:, 120:240]),
    "a part of a transposed one": (random(150, 200), random(120, 500)[:, 100:300].T),
    "one number everywhere": (torch.ones(1, 1).expand(150, 200), random(200, 120)),
    "few rows": (random(3, 2000), random(2000, 900)),
    "small": (random(4, 5), random(5, 6)),
    "nothing": (random(0, 200), random(200, 120)),
    "another type": (random(150, 200).double(), random(200, 120).double()),
}


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("name", MATRICES)
def test_products_and_gradients_equal_the_reference(name: str) -> None:
    a, b = (matrix.detach().requires_grad_() for matrix in MATRICES[name])
    precise = [matrix.detach().double().requires_grad_() for matrix in (a, b)]
    product, expected = a @ b, precise[0] @ precise[1]
    assert product.dtype == a.dtype
    gradients = torch.autograd.grad(product.sum(), [a, b])  # an expanded scalar: strides of 0
    right = torch.autograd.grad(expected.sum(), precise)
    for actual, wanted in zip((product, *gradients), (expected, *right), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("onednn")
def test_mkl_multiplies_again_after_it_was_removed() -> None:
    a, b = random(300, 400), random(400, 500)
    by_onednn = a @ b
    cpu_gemm.remove()
    by_mkl = a @ b
    torch.testing.assert_close(by_onednn, by_mkl, rtol=1e-5, atol=1e-4)
    cpu_gemm.install()
    assert torch.equal(a @ b, by_onednn)
