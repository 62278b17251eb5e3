"""Planning and launching do not import torch and Megatron-Core, which takes seconds."""

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
    """The last line of a program's output in a new interpreter: which of the two it has imported."""
    command = [sys.executable, "-c", program + HEAVY, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("module", MODULES)
def test_planning_and_launching_import_neither_torch_nor_megatron_core(module: str) -> None:
    assert heavy_modules(f"import {module}") == ""


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_a_plan_imports_neither_torch_nor_megatron_core(engine: str) -> None:
    options = ("model=mone_925m", "model.vocab_size=32000", "cluster.gpu=h100", "compute.precision=bf16", f"engine={engine}")
    assert heavy_modules("from launch.plan import main; main()", *options) == ""
