"""The library of CPU kernels: compiled at first use, for this machine, and cached.

    _scale = define("scale", "(Tensor x, float factor) -> Tensor")    # mone::scale, of csrc/operators.cpp
    if usable(x):
        y = _scale(x, 2.0)

The kernels are operators of torch, `torch.ops.mone`, which check their arguments.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

from mone_model.kernels.cpu import build as cpu_build

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
# No -ffast-math: the exponential relies on the order of its additions.
FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-w"]
FLAGS.append("-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native")

# Prefix of the folders in which a library is compiled, and the file in them that is locked during a build.
BUILDING, IN_USE = "build-", "in-use"

WORD = 16
"""Neurons in a word of a mask; kernels read this many numbers at a time."""
# Types of selection and decode. The other kernels are for fp32 only.
DTYPES = (torch.float32, torch.bfloat16)

_OPERATORS = torch.library.Library("mone", "FRAGMENT")

# False after `compute.cpu_kernels=off` (`mone_model.expert_backends.choose_backend`).
allowed = True


def available() -> bool:
    """Whether the kernels are enabled and work on this machine. Logs the reason once if they do not."""
    return allowed and _compiles()


@functools.cache
def _compiles() -> bool:
    try:
        _library()
    except Exception as error:  # any error of the compiler or the linker
        reason = str(error).strip().splitlines()[0]
        logger.warning(
            "CPU kernels: not built (%s); using slower operations of torch. Install a C++ compiler (g++).", reason
        )
        return False
    return True


def usable(*tensors: torch.Tensor, dtypes: Collection[torch.dtype] = (torch.float32,)) -> bool:
    """Whether kernels for these data types can be used for these tensors on this machine."""
    return all(tensor.device.type == "cpu" and tensor.dtype in dtypes for tensor in tensors) and available()


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled sources, from the cache if they were compiled for this processor and this torch before."""
    from torch.utils import cpp_extension

    sources = (source.read_text() for source in sorted(SOURCES.iterdir()))
    built_from = "".join([torch.__version__, *FLAGS, _processor(), *sources])
    name = f"cpu-{_digest(built_from.encode())}"
    folder = Path(cpp_extension.get_default_build_root()) / "mone"
    for path in sorted(folder.glob(f"{name}-*.so")):
        if _is_intact(path):
            with contextlib.suppress(OSError):  # for example linked on another system
                return ctypes.CDLL(str(path))  # unlike torch.ops.load_library, it keeps the symbols local
    return _build(folder, name)


def _is_intact(path: Path) -> bool:
    """Whether the content has the hash in the name. Loading a truncated library would kill the process."""
    try:
        return path.is_file() and path.stem.endswith(f"-{_digest(path.read_bytes())}")
    except OSError:
        return False


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _build(folder: Path, name: str) -> ctypes.CDLL:
    """Compile, and keep the library in `folder`; if that is not writable, use it for this process only."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=BUILDING, ignore_cleanup_errors=True)
    except OSError as error:
        logger.warning("CPU kernels: cannot be cached (%s); compiled for this process only", error)
        temporary = tempfile.TemporaryDirectory(prefix=BUILDING, ignore_cleanup_errors=True)
    # Not in torch's own cache: its lock remains after a killed build, and all later builds wait for it.
    with temporary, _mark_in_use(Path(temporary.name)):
        built = _compile(Path(temporary.name))
        library = ctypes.CDLL(str(built))
        with contextlib.suppress(OSError):  # this process can use it anyway
            _publish(built, folder, name)
    return library


def _compile(folder: Path) -> Path:
    """Compile the library in this folder; RuntimeError if that fails. A build that is killed leaves no files."""
    command = [sys.executable, "-P", cpu_build.__file__, str(folder), str(SOURCES), *FLAGS]
    output, pipe = subprocess.STDOUT, subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=output, text=True, start_new_session=True) as build:
        assert build.stdout is not None
        lines = build.stdout.read().splitlines()
        if build.wait() != 0:
            raise RuntimeError(lines[-1] if lines else f"the compiler ended with code {build.returncode}")
    return next(folder.glob(f"{cpu_build.NAME}*.so"))


def _publish(library: Path, folder: Path, name: str) -> None:
    """Rename it, atomically, to a name with the hash of its content, and remove damaged libraries."""
    path = folder / f"{name}-{_digest(library.read_bytes())}.so"
    with open(library, "rb") as file:
        os.fsync(file.fileno())
    os.replace(library, path)
    for other in folder.glob(f"{name}*.so"):
        if not _is_intact(other):
            with contextlib.suppress(OSError):
                other.unlink()


@contextlib.contextmanager
def _mark_in_use(folder: Path) -> Iterator[None]:
    """Hold a lock in the folder, which the system releases when this process ends."""
    with open(folder / "new", "w") as file:
        with contextlib.suppress(OSError):  # without locks, no process removes the folder
            fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(folder / "new", folder / IN_USE)
        yield


def _remove_abandoned(folder: Path) -> None:
    """Remove the folders of builds that were killed together with their compilers."""
    for path in folder.glob(f"{BUILDING}*/{IN_USE}"):
        # Skip folders that a running build has locked, or that belong to another user.
        with contextlib.suppress(OSError), open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.parent, ignore_errors=True)


def _processor() -> str:
    """The processor, on which -native depends: machines of several kinds may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def define(name: str, schema: str, *, differentiable: bool = False) -> Any:
    """Define `mone::NAME` and return it; its kernel is in csrc/operators.cpp. The first call loads the library.

    differentiable: gradients are registered elsewhere, by torch.library.register_autograd. Others' outputs need no gradient.
    Raises RuntimeError at the first call if the library cannot be built.
    """
    _OPERATORS.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    operator = getattr(torch.ops.mone, name).default
    if not differentiable:  # else torch would return outputs that seem to have a gradient
        _OPERATORS.impl(name, torch.library.fallthrough_kernel, "Autograd")

    # The library registers kernels for CPU tensors, which replace this one.
    @torch.library.impl(_OPERATORS, name, "CompositeExplicitAutograd")
    def load_first(*arguments: Any) -> Any:
        if _library.cache_info().currsize:
            raise NotImplementedError(f"mone::{name} is for CPU tensors only")
        _library()
        return operator(*arguments)

    return operator
