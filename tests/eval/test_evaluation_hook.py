"""`evaluation.text`: the loss of a run on text outside of its blend."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mone_common.run_records import read_metrics
from tests.e2e.test_pretrain import OPTIONS
from tests.tiny import make_shards

Command = Callable[..., Any]
FEW = [
    "training.steps=4",
    "logging.figure_interval=0",
    "logging.neuron_interval=0",
    "checkpoint.interval=0",
    "evaluation.interval=2",
    "logging.wandb_mode=disabled",
]


def test_a_run_records_the_loss_on_other_text(command: Command, tmp_path: Path) -> None:
    make_shards(tmp_path / "a", name="a")
    make_shards(tmp_path / "b", name="b", seed=1)
    shutil.copytree(tmp_path / "a", tmp_path / "again")
    done = command(
        "train.pretrain",
        *OPTIONS,
        *FEW,
        "data.blend=[{path: a}]",
        "evaluation.text=[again,b]",
        "run.dir=run",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [each for each in read_metrics(tmp_path / "run") if "evaluation/loss/b" in each]
    validated = [each for each in read_metrics(tmp_path / "run") if "validation/loss" in each]
    assert [each["step"] for each in records] == [2, 4]
    for record, other in zip(records, validated, strict=True):
        assert record["evaluation/loss/a"] == other["validation/loss/a"] == other["validation/loss"]
        assert record["evaluation/loss/b"] != record["evaluation/loss/a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("none", "none: no such folder of token shards"), ("a", "evaluation.text: a is in data.blend")],
)
def test_wrong_text_is_refused(command: Command, tmp_path: Path, text: str, expected: str) -> None:
    make_shards(tmp_path / "a", name="a")
    done = command("train.pretrain", *OPTIONS, "data.blend=[{path: a}]", f"evaluation.text=[{text}]", "run.dir=run")
    assert done.returncode == 2
    assert expected in done.stderr
