"""Builds of the CPU kernels: equal results on other processors; damaged and interrupted builds are repeated."""

import fcntl
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from mone_model.activations import ACTIVATIONS
from mone_model.kernels.cpu import attention as cpu_attention
from mone_model.kernels.cpu import experts as cpu
from mone_model.kernels.cpu import library as cpu_library
from mone_model.neuron_selection import select_and_gate
from tests.conftest import ROOT


def everything() -> list[torch.Tensor]:
    """Outputs, masks and gradients of all kernels for fixed inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens_E = torch.tensor([3, 0, 140, 7])
    x_ND, gate_up, down = random(150, 176), random(4, 2, 70, 176) / 13, random(4, 70, 176) / 8
    probs_N = torch.rand(150, generator=generator)
    for tensor in (x_ND, gate_up, down, probs_N):
        tensor.requires_grad_()
    kept = cpu.experts(x_ND, gate_up, down, probs_N, tokens_E, 17, "silu", counting=True)
    results = [*kept, *torch.autograd.grad(kept.out_ND, [x_ND, gate_up, down, probs_N], random(150, 176))]
    with torch.no_grad():
        results += cpu.decode(x_ND, gate_up, down, probs_N, tokens_E, 17, "gelu")
        weights = gate_up.bfloat16(), down.bfloat16()
        results += cpu.decode(x_ND.bfloat16(), *weights, probs_N, tokens_E, 17, "silu", threshold=0.4)
    for dtype in (torch.float32, torch.bfloat16):
        gate, up = (random(9, 100).to(dtype).requires_grad_() for _ in range(2))
        gated = select_and_gate(gate, up, torch.rand(9, generator=generator), 33, "sigmoid")
        results += [*gated, *torch.autograd.grad(gated.hidden_NH, [gate, up], random(9, 100).to(dtype))]
        # Infinity, NaN, and values whose exponentials exceed the range of fp32.
        scales = [0.0, 1.0, 40.0, 88.5, 88.8, 1e4, 1e38, math.inf]
        gate = torch.tensor([[math.nan, *scales, *(-scale for scale in scales)]]).to(dtype).requires_grad_()
        up = torch.ones_like(gate)
        for activation in ACTIVATIONS:
            for k in (1, 2, 9, 17):
                results.append(select_and_gate(gate, up, torch.ones(1), k, activation).masks_NW)
            gated = select_and_gate(gate, up, torch.ones(1), 17, activation)
            results += [gated.hidden_NH[:, 1:], torch.autograd.grad(gated.hidden_NH, gate, up)[0][:, 1:]]
    qkv = [random(500, 1, heads, 46).requires_grad_() for heads in (4, 2, 2)]
    context = cpu_attention.attend(*qkv)
    results += [context, *torch.autograd.grad(context, qkv, random(500, 1, 4, 46))]
    return [result.detach() for result in results]


@pytest.fixture(scope="module")
def tiny_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile a one-line library like the kernels."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "sources").mkdir()
    (folder / "sources/answer.cpp").write_text('extern "C" int answer() { return 42; }')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "SOURCES", folder / "sources")
        patch.setattr(cpp_extension, "get_default_build_root", lambda: folder)
        assert cpu_library._library.__wrapped__().answer() == 42
    assert [path.name for path in (folder / "mone").iterdir()] == [path.name for path in (folder / "mone").glob("cpu-*.so")]
    return next((folder / "mone").iterdir())


@pytest.fixture
def cache(tiny_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached library in a temporary folder; a new compilation copies it and is counted."""

    def compile_quickly(folder: Path) -> Path:
        (tmp_path / "compiled").open("a").write("once\n")
        return Path(shutil.copy(tiny_library, folder / "mone_cpu.so"))

    monkeypatch.setattr(cpu_library, "_compile", compile_quickly)
    monkeypatch.setattr(cpu_library, "SOURCES", tiny_library.parent.parent / "sources")
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: tmp_path)
    path = tmp_path / "mone" / tiny_library.name
    path.parent.mkdir()
    shutil.copy(tiny_library, path)
    return path


def answer() -> int:
    return int(cpu_library._library.__wrapped__().answer())


def times_compiled(cache: Path) -> int:
    notes = cache.parent.parent / "compiled"
    return len(notes.read_text().splitlines()) if notes.exists() else 0


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a dangling link":
        path.symlink_to(path.with_name("nowhere"))
    else:
        wrong = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"empty": b"", "truncated": content[:5000], "another bit": wrong}[how])


@pytest.mark.parametrize("how", ["empty", "truncated", "another bit", "a folder", "a dangling link"])
def test_a_damaged_library_is_compiled_again(cache: Path, how: str) -> None:
    assert answer() == 42
    assert times_compiled(cache) == 0
    damage(cache, how)
    assert answer() == 42
    assert times_compiled(cache) == 1
    if how != "a folder":
        assert answer() == 42
        assert times_compiled(cache) == 1
        assert list(cache.parent.iterdir()) == [cache]


def test_an_unwritable_cache_compiles_at_every_start(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(cache.parent.parent))
    shutil.rmtree(cache.parent)
    cache.parent.write_text("")  # root can write to every folder, but a file is not a folder
    for _ in range(2):
        assert answer() == 42
        assert "cannot be cached" in caplog.text
        caplog.clear()
    assert times_compiled(cache) == 2
    assert not list(cache.parent.parent.glob("build-*"))


def test_processes_that_compile_at_once_all_get_whole_libraries(cache: Path) -> None:
    damage(cache, "truncated")
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: answer(), range(16))) == [42] * 16
    assert list(cache.parent.iterdir()) == [cache]


def test_leftovers_of_killed_builds_are_removed(cache: Path) -> None:
    damage(cache, "empty")
    left, used = cache.parent / "build-left", cache.parent / "build-used"
    for folder in (left, used):
        folder.mkdir()
        (folder / "in-use").touch()
    with open(used / "in-use") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert answer() == 42
    assert sorted(cache.parent.iterdir()) == [used, cache]


def test_a_killed_build_takes_its_compilers_and_its_folder_with_it(tmp_path: Path) -> None:
    compiler, started = tmp_path / "c++", tmp_path / "started"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) sleep 300 & echo $! > {started}; wait;; *) exec c++ "$@";; esac\n'
    )
    compiler.chmod(0o755)
    code = f"""
from torch.utils import cpp_extension
from mone_model.kernels.cpu import library as cpu_library
cpp_extension.get_default_build_root = lambda: {str(tmp_path)!r}
cpu_library._library()
"""
    build = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "CXX": str(compiler)})
    try:
        wait_until(lambda: started.exists() and started.read_text().endswith("\n"))
        assert list(tmp_path.glob("mone/build-*"))
    finally:
        build.kill()
        build.wait()
    wait_until(lambda: not list(tmp_path.glob("mone/*")) and not Path(f"/proc/{int(started.read_text())}").exists())


def wait_until(come: Callable[[], bool]) -> None:
    for _ in range(600):
        if come():
            return
        time.sleep(0.1)
    raise AssertionError("did not come within a minute")


def test_another_version_of_torch_compiles_its_own_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.0")
    assert answer() == 42
    assert times_compiled(cache) == 1
    assert len(list(cache.parent.iterdir())) == 2


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_results_do_not_depend_on_register_width(processor: str, tmp_path: Path) -> None:
    code = f"""
import torch
from torch.utils import cpp_extension
from mone_model.kernels.cpu import library as cpu_library
from tests.unit.test_kernel_builds import everything
cpu_library.FLAGS[-1] = "-march={processor}"
cpp_extension.get_default_build_root = lambda: {str(tmp_path)!r}
torch.save(everything(), {str(tmp_path / "results.pt")!r})
"""
    # In a separate process, since operators can be registered only once.
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert list(tmp_path.glob("mone/cpu-*.so"))
    for ours, theirs in zip(torch.load(tmp_path / "results.pt"), everything(), strict=True):
        if ours.dtype in (torch.int16, torch.bool):
            assert torch.equal(ours, theirs)
        else:
            tolerance = 1e-2 if ours.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
