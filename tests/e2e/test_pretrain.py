"""mone-pretrain with real processes, files and signals."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mone_common.run_folder import lock_run_folder
from mone_common.run_records import read_metrics
from tests.conftest import ROOT
from tests.tiny import make_shards

STEPS = 8
OPTIONS = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.seq_length=32",
    "model.num_experts=4",
    "model.moe_ffn_hidden_size=32",
    "model.shared_expert_ffn_hidden_size=32",
    "model.hidden_dropout=0.1",
    "model.neuron_balance_coeff=0.01",
    "model.z_loss_coeff=0.001",
    "compute.experts=grouped",  # with auto, two runs may choose different backends, which round differently
    f"training.steps={STEPS}",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
    "optimizer.warmup_steps=2",
    "evaluation.interval=4",
    "evaluation.sequences=6",
    "checkpoint.interval=2",
    "logging.interval=1",
    "logging.neuron_interval=4",
    "logging.figure_interval=0",
    "logging.wandb_mode=disabled",
]
RECORDED = ["logging.figure_interval=4", "logging.wandb_mode=offline"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_shards(folder / "a", name="a")
    make_shards(folder / "b", name="b", seed=1)
    return folder


def start(folder: Path, name: str, *options: str, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    data = "data.blend=[{path: a, weight: 0.7}, {path: b, weight: 0.3}]"
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "train.pretrain", data, f"run.name={name}", *OPTIONS, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def values(folder: Path, name: str, metric: str) -> dict[int, float]:
    return {record["step"]: record[metric] for record in read_metrics(folder / "runs" / name) if metric in record}


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> str:
    return finish(start(folder, "undisturbed", *RECORDED))


def test_a_run_learns_and_leaves_everything_in_its_folder(folder: Path, undisturbed: str) -> None:
    run = folder / "runs/undisturbed"
    losses = values(folder, "undisturbed", "train/loss")
    assert list(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1] - 0.05
    for name in ("loss", "expert_load", "neuron_use"):
        assert (run / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "environment.json").read_text())["packages"]["megatron-core"]
    assert "vocab_size: 64" in (run / "config.yaml").read_text()
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000006", "step-00000008"]
    assert f"step {STEPS}/{STEPS}" in undisturbed
    assert re.search(r"ETA \d+:\d\d:\d\d", undisturbed)


def test_every_recorded_name_is_documented(folder: Path, undisturbed: str) -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    names = {name for record in read_metrics(folder / "runs/undisturbed") for name in record} - {"step", "time"}
    general = {re.sub(r"/layer_\d+$", "/layer_NN", name) for name in names}
    general = {re.sub(r"^validation/loss/.*", "validation/loss/SOURCE", name) for name in general}
    assert len(general) > 25
    assert [name for name in sorted(general) if f"`{name}`" not in text] == []


def test_the_same_command_gives_the_same_losses_also_after_a_signal(folder: Path, undisturbed: str) -> None:
    process = start(folder, "interrupted", *RECORDED)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step 2/{STEPS}"):
            process.send_signal(signal.SIGTERM)
            break
    assert "the same command continues" in finish(process)
    resumed = finish(start(folder, "interrupted", *RECORDED))
    assert "resumed from" in resumed
    for metric in ("train/loss", "train/grad_norm", "validation/loss", "aux/neuron_balance_loss", "train/tokens"):
        assert values(folder, "interrupted", metric) == values(folder, "undisturbed", metric), metric
    assert len(list((folder / "runs/interrupted/wandb").glob("offline-run-*"))) == 2
    ids = {path.name.split("-")[-1] for path in (folder / "runs/interrupted/wandb").glob("offline-run-*")}
    assert len(ids) == 1, "a resumed run continues its W&B run"


def test_two_processes_resume_bit_equal_too(folder: Path) -> None:
    options = ["parallel.expert=2", "training.micro_batch_size=1", "compute.precision=bf16"]
    finish(start(folder, "pair", *options, processes=2))
    assert "stopped at step 3" in finish(start(folder, "stopped", *options, "run.stop_at_step=3", processes=2))
    finish(start(folder, "stopped", *options, processes=2))
    for metric in ("train/loss", "train/grad_norm", "validation/loss"):
        assert values(folder, "stopped", metric) == values(folder, "pair", metric), metric


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(folder: Path) -> None:
    finish(start(folder, "diverged", "run.stop_at_step=2"))
    options = ("optimizer.lr=1e30", "optimizer.clip_grad=0", "guard.max_dropped=1", "checkpoint.interval=0")
    output = finish(start(folder, "diverged", *options), code=3)
    assert "guard.max_dropped=1" in output
    assert "not finite" in output
    assert "Traceback" not in output
    assert json.loads((folder / "runs/diverged/status.json").read_text())["state"] == "failed"
    assert [path.name for path in (folder / "runs/diverged/checkpoints").iterdir()] == ["step-00000002"]


def test_a_run_continues_with_another_engine_world_size_batch_size_blend_and_length(folder: Path) -> None:
    finish(start(folder, "changed", "run.stop_at_step=4"))
    options = ["training.global_batch_size=4", "training.steps=10", "data.blend=[{path: b}]", "parallel.expert=2"]
    options += ["engine=deepspeed", "deepspeed.zero_stage=2", "training.micro_batch_size=1"]
    output = finish(start(folder, "changed", *options, processes=2))
    assert "data.blend changed: from sample 32 on, b from its sample 10" in output
    losses, tokens = values(folder, "changed", "train/loss"), values(folder, "changed", "train/tokens")
    assert list(losses) == list(range(1, 11))
    assert tokens[4] == 4 * 8 * 32
    assert tokens[10] == tokens[4] + 6 * 4 * 32
    # A branch on two processes, off a checkpoint that the run still has, is the run itself.
    branch = ["init.source=runs/changed", "init.step=8", "init.branch=true"]
    assert "branched off runs/changed" in finish(start(folder, "branch", *options, *branch, processes=2))
    assert values(folder, "branch", "train/loss") == {step: losses[step] for step in (9, 10)}
    # No moment or step is lost: the loss does not jump.
    assert abs(losses[5] - losses[4]) < 0.2
    assert losses[10] < losses[1]


def test_two_processes_with_expert_parallelism_train_the_same(folder: Path, undisturbed: str) -> None:
    # Without dropout, whose random numbers depend on the rank; blend, order and initial weights are equal.
    options = ["model.hidden_dropout=0", "model.router_topk=4", "model.activation_ratio=1"]
    finish(start(folder, "one", *options))
    finish(start(folder, "two", *options, "training.micro_batch_size=1", "parallel.expert=2", processes=2))
    for metric in ("train/loss", "train/grad_norm", "validation/loss"):
        one, two = values(folder, "one", metric), values(folder, "two", metric)
        assert one.keys() == two.keys()
        for step in one:
            assert two[step] == pytest.approx(one[step], rel=1e-5), (metric, step)


def test_resume_never_overwrites_a_run_or_changes_its_model(folder: Path, undisturbed: str) -> None:
    assert "resume=never" in finish(start(folder, "undisturbed", "resume=never"), code=2)
    output = finish(start(folder, "undisturbed", "model.activation_ratio=0.5", f"training.steps={STEPS + 1}"), code=2)
    assert "model.activation_ratio=0.5" in output
    assert "Traceback" not in output
    assert "run.seed=7 (saved: 1234)" in finish(start(folder, "undisturbed", "run.seed=7"), code=2)
    with lock_run_folder(folder / "runs/undisturbed"):
        output = finish(start(folder, "undisturbed", f"training.steps={STEPS + 1}"), code=2)
    assert "another run uses it" in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["model.hiden_size=64"], "hiden_size"),
        (["data.blend=[{path: nowhere}]"], "nowhere"),
        (["parallel.expert=3"], "parallel"),
        (["data.blend=[{weight: 1}]"], "path"),
    ],
)
def test_invalid_options_are_reported_before_anything_is_written(folder: Path, options: list[str], expected: str) -> None:
    process = start(folder, "refused", *options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert expected in output
    assert "Traceback" not in output
    assert not (folder / "runs/refused").exists()


def test_wandb_without_a_server_continues_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(folder))
    options = ("logging.wandb_mode=online", "training.steps=3")
    assert "W&B has no login" in finish(start(folder, "no_login", *options))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    assert "W&B could not start online" in finish(start(folder, "no_server", *options))
    for name in ("no_login", "no_server"):
        assert list(values(folder, name, "train/loss")) == [1, 2, 3]
        assert list((folder / "runs" / name).glob("wandb/offline-run-*"))
