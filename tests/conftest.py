"""Shared fixtures: one-process groups for unit tests, and runs of real processes."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mone_model.kernels.cpu import library

ROOT = Path(__file__).parent.parent


def pytest_xdist_auto_num_workers() -> int:
    """One process a core and one more: the tests of real processes, launching and Slurm often wait."""
    return min(4, len(os.sched_getaffinity(0)) + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slurm's tests first: their file takes the longest, and pytest-xdist starts the files in this order."""
    items.sort(key=lambda item: item.path.parent.name != "slurm")


@pytest.fixture(autouse=True)
def _cpu_kernels() -> Iterator[None]:
    yield
    library.allowed = True  # a test may have built a model with compute.cpu_kernels=off


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Restore environment variables: the DeepSpeed engine sets LOCAL_RANK, which commands in later tests would read."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Seed what tests draw without a seed of their own."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def one_process() -> Iterator[None]:
    """Megatron-Core's groups over this process alone."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from mone_model.config import ParallelConfig
    from train.runtime import distributed

    with distributed(ParallelConfig(), seed=1, timeout_minutes=1):
        torch.set_num_threads(1)  # the models are tiny
        # The shape that the pipeline schedules expect. A backward pass before the first of them would set another.
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
        yield


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m module args` (under torchrun with processes > 1) in an empty folder; the caller checks returncode."""

    def run(module: str, *args: str, processes: int = 1, timeout: int = 300) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        return subprocess.run(
            [sys.executable, *launcher, "-m", module, *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def call_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run a command's `main` in this process; gives exit code, stdout and stderr."""

    def run(main: Callable[[], None], *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        code: Any = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run
