"""Planning and launching start without torch and Megatron-Core, whose imports take seconds."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

MODULES = (
    *("train", "train.config", "train.config_rules", "train.launcher", "train.meeting", "train.preparation"),
    *(
        "train.run_notes",
        "train.pretrain",
        "train.trained_model",
        "launch.plan",
        "launch.slurm",
        "launch.status",
        "launch.report",
    ),
)
HEAVY = """
import sys
print(*({"torch", "megatron.core"} & sys.modules.keys()))
"""


def heavy_modules(program: str, *arguments: str) -> str:
    """Which of them a program has imported at its end, in a fresh interpreter; the last line of what it prints."""
    command = [sys.executable, "-c", program + HEAVY, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("module", MODULES)
def test_planning_and_launching_import_neither_torch_nor_megatron_core(module: str) -> None:
    assert heavy_modules(f"import {module}") == ""


def test_a_plan_imports_neither_torch_nor_megatron_core() -> None:
    options = ("model=mone_925m", "model.vocab_size=32000", "cluster.gpu=h100", "compute.precision=bf16")
    assert heavy_modules("from launch.plan import main; main()", *options) == ""
