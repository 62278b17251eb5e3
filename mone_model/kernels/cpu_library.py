"""The CPU kernels' library: compiled at first use, for this machine, and cached.

if cpu_library.available():
    cpu_library.call("rms_norm", rows, width, x, ...)
"""

import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

SOURCES = Path(__file__).parent / "csrc"
# No -ffast-math: the exponential relies on the order of its additions.
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-w"]
FLAGS.append("-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native")

# How functions of a type end.
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@functools.cache
def available() -> bool:
    """Whether the kernels can be used here; says once why not."""
    try:
        _library()
    except Exception as error:  # whatever a compiler or a linker may have to say
        reason = str(error).strip().splitlines()[0]
        print(
            f"CPU kernels: not built ({reason}); torch's own operations serve, slower. A C++ compiler helps.",
            file=sys.stderr,
        )
        return False
    return True


def usable(*tensors: torch.Tensor, dtypes: Collection[torch.dtype] = (torch.float32,)) -> bool:
    """Whether kernels for these types can be used for these tensors here."""
    return all(tensor.device.type == "cpu" and tensor.dtype in dtypes for tensor in tensors) and available()


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled sources, from the cache if they were compiled for this very processor before."""
    from torch.utils import cpp_extension

    sources = sorted(SOURCES.iterdir())
    built_from = "".join([*FLAGS, _processor(), *(source.read_text() for source in sources)])
    folder = Path(cpp_extension.get_default_build_root()) / "mone"
    path = folder / f"cpu-{hashlib.sha256(built_from.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Not in place: the lock of torch's own cache outlives a build that is killed, and then all wait for ever.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            cpp_extension.load(
                "mone_cpu",
                [str(source) for source in sources if source.suffix == ".cpp"],
                extra_cflags=FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=temporary,
                is_python_module=False,
                with_cuda=False,
            )
            os.replace(next(Path(temporary).glob("*.so")), path)
    return ctypes.CDLL(str(path))


def _processor() -> str:
    """What -native depends on: a home folder may be shared by several kinds of machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


# To ask for torch.Tensor takes many times as long.
_PLAIN = (int, float, type(None))


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library: tensors by address, None as null, int as int64, float as fp32; threads come last."""
    function = getattr(_library(), name)
    if function.argtypes is None:
        types = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_float}
        function.argtypes = [*(types.get(type(argument), ctypes.c_void_p) for argument in arguments), ctypes.c_int64]
    plain = [argument if isinstance(argument, _PLAIN) else argument.data_ptr() for argument in arguments]
    function(*plain, torch.get_num_threads())


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [N, H]: rows may lie apart, the numbers of a row not; copied only if need be."""
    rows = tensor.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()
