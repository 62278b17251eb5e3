"""Matrix products by oneDNN on AMD processors, where torch uses MKL, which does not use AVX-512 there.

    cpu_gemm.install()         # mone_model.megatron.prepare() calls it where there is no GPU
    x @ w.T                    # by oneDNN, forward and backward

It does nothing on other processors. `python -m benchmarks.step` measures the difference.
"""

import warnings
from pathlib import Path

import torch

_replacing: list[torch.library.Library] = []
# For smaller products the setup of oneDNN costs more than it saves.
_LEAST_WORK, _LEAST_ROWS = 2**21, 16


def install() -> None:
    """Replace `aten::mm` of large fp32 matrices on the CPU by oneDNN, on processors where that is faster."""
    if not _replacing and _mkl_is_slow():
        _multiply_by_mkl = torch.library.get_kernel("aten::mm", "CPU")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        multiply_by_onednn = torch.ops.mkldnn._linear_pointwise.default

        def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            rows, inner = a.shape
            if a.dtype != torch.float32 or rows < _LEAST_ROWS or rows * inner * b.size(1) < _LEAST_WORK:
                return _multiply_by_mkl.call_boxed(keys, a, b)
            # With other strides oneDNN is hundreds of times slower.
            a = a if 1 in a.stride() and 0 not in a.stride() else a.contiguous()
            weight = b.t() if b.is_contiguous() or b.t().is_contiguous() else b.contiguous().t()
            return multiply_by_onednn(a, weight, None, "none", [], "")

        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a kernel is replaced is intended
            library.impl("mm", mm, "CPU")
        _replacing.append(library)


def remove() -> None:
    """Undo `install`."""
    while _replacing:
        _replacing.pop()._destroy()


def _mkl_is_slow() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "AuthenticAMD" in processor and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
