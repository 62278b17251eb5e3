"""Sweeps as a user types them: `python -m train.pretrain --multirun`, with real runs on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from mone_common.run_folder import find_runs
from mone_common.run_records import read_config, read_metrics, read_status
from tests.conftest import ROOT
from tests.faults.jobs import OPTIONS, STEPS, make_data
from tests.faults.wandb_server import Server
from tests.tiny import make_shards

Call = Callable[..., tuple[int, str, str]]
BLEND = "data.blend=[{path: a, weight: 0.7}, {path: b, weight: 0.3}]"
SWEEP = (*OPTIONS, BLEND, "parallel.expert=1", "evaluation.interval=0", "checkpoint.interval=0", "hydra.launcher.jobs=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweeps")
    make_data(folder)
    # Simulates an edit of the checkout while the sweep runs.
    (folder / "train").mkdir()
    (folder / "train/__init__.py").write_text("raise SystemExit('the code of the checkout')")
    return folder


def start(folder: Path, name: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "train.pretrain", "--multirun", *SWEEP, f"run.name={name}", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        end(process)
    assert process.returncode == code, output
    return output


def end(process: subprocess.Popen[str]) -> None:
    """Kill the process and its children."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            each.kill()


DIVERGING = ("model.activation_ratio=1,0.25", "optimizer.lr=1e-3,1e30", "optimizer.clip_grad=0", "guard.max_dropped=1")


@pytest.fixture(scope="module")
def swept(folder: Path) -> str:
    """Two ratios at two learning rates, one of which diverges."""
    return finish(start(folder, "swept", *DIVERGING, "logging.wandb_mode=offline"), code=1)


def test_every_point_is_a_run_of_its_own_and_a_failed_one_stops_no_other(folder: Path, swept: str) -> None:
    runs = find_runs([folder / "runs/swept"])
    assert [run.name for run in runs] == [
        f"activation_ratio={ratio},lr={rate}" for ratio in ("0.25", "1") for rate in ("0.001", "1e+30")
    ]
    for run in runs:
        options = read_config(run)
        assert f"activation_ratio={options['model.activation_ratio']:g}," in run.name
        diverges = options["optimizer.lr"] == 1e30
        assert read_status(run)["state"] == ("failed" if diverges else "complete")
        assert (f"  failed: {run.name}: Diverged: " in swept) == diverges
        assert (run / "log.txt").read_text().count(f"step {STEPS}/{STEPS}") == (not diverges)
    assert "sweep: 2 complete, 2 failed" in swept
    assert re.search(r"\[1/4\] activation_ratio=1,lr=0\.001: complete in 0:\d\d:\d\d, validation loss \d\.\d{4}", swept)
    assert "Traceback" not in swept


def test_a_restarted_sweep_skips_finished_points(folder: Path, swept: str) -> None:
    metrics = folder / "runs/swept/activation_ratio=1,lr=0.001/metrics.jsonl"
    before = metrics.stat()
    output = finish(start(folder, "swept", *DIVERGING), code=1)
    assert "2 of 4 points are finished already" in output
    assert "activation_ratio=1,lr=1e+30: started" in output
    assert metrics.stat() == before


def test_wandb_sync_groups_the_runs_of_an_offline_sweep(folder: Path, swept: str) -> None:
    server = Server()
    runs = sorted((folder / "runs/swept").glob("*lr=0.001/wandb/offline-run-*"))
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "HOME": str(folder)}
    try:
        sync = [sys.executable, "-m", "wandb", "sync", *map(str, runs)]
        done = subprocess.run(sync, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    groups = {run["displayName"]: run["groupName"] for run in server.runs if run["displayName"]}
    assert groups == {f"swept/activation_ratio={ratio},lr=0.001": "swept" for ratio in ("0.25", "1")}


def test_a_signal_lets_its_runs_save_and_the_same_command_continues(folder: Path) -> None:
    two = ("hydra.launcher.jobs=1", "hydra.launcher.processes=2", "parallel.expert=2")
    process = start(folder, "endless", "run.seed=1,2", "training.steps=100000", *two)
    first, second = (folder / f"runs/endless/seed={seed}" for seed in (1, 2))
    try:
        began = time.monotonic()
        while len(read_metrics(first)) < 3:
            assert time.monotonic() - began < 120
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)  # background processes of a shell ignore SIGINT
    except BaseException:
        end(process)
        raise
    output = finish(process, code=0)
    assert "sweep: 2 stopped" in output
    assert "the same command continues" in output
    assert read_status(first)["state"] == "stopped"
    assert json.loads((first / "environment.json").read_text())["world_size"] == 2
    assert len(list((first / "checkpoints").glob("step-*"))) == 1
    assert read_status(second) == {}


def call(call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> tuple[int, str, str]:
    from train.pretrain import main

    monkeypatch.chdir(folder)
    return call_main(main, "--multirun", *SWEEP, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["model.num_experts=4,6", "parallel.expert=4", "hydra.launcher.processes=4"],
            "1 of 2 points cannot run on 4 processes each",
        ),
        (["run.seed=1,2", "data.blend=[{path: nowhere}]"], "seed=2: nowhere"),
        (["run.seed=1,2", "hydra.launcher.jobs=0"], "hydra.launcher.jobs=0: must be at least 1"),
        (["run.seed=1,2", "hydra.sweep.subdir=same"], "several points have the folder runs/mone/same"),
        (["run.seed=1,2", "run.name=../../x"], "run.name=../../x: names a folder below runs/"),
        (["run.seed=1,2", "run.dir=."], "run.dir=.: is the current or the home folder"),
        (["run.seed=1,2", "parallel.expert=2"], "start 2 (hydra.launcher.processes)"),
    ],
)
def test_a_point_that_cannot_run_is_named_before_any_is_started(
    call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path, options: list[str], message: str
) -> None:
    code, out, error = call(call_main, monkeypatch, folder, *options)
    assert (code, out) == (2, "")
    assert message in error
    assert not list((folder / "runs").glob("mone/*/"))


def test_a_folder_with_other_options_is_refused(
    call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path, swept: str
) -> None:
    options = ["run.name=swept", "model.activation_ratio=1,0.25", "optimizer.lr=1e-3,1e-2", "optimizer.weight_decay=0.2"]
    code, _, error = call(call_main, monkeypatch, folder, *options)
    assert code == 2
    assert "activation_ratio=1,lr=0.001 contains a run with other options: optimizer.weight_decay=0.1 (now 0.2)" in error
    assert "activation_ratio=0.25,lr=0.01" not in error


def test_long_names_of_points_are_cut_and_stay_apart(call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for number in range(8):
        make_shards(folder / f"source-of-a-mixture-{number}", name=f"source {number}", documents=20)
    first, second = (
        ",".join(f"{{path: source-of-a-mixture-{number}, weight: {max(1, number - last)}}}" for number in range(8))
        for last in (5, 6)
    )
    slurm = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=0", "hydra.launcher.processes_per_node=1"]
    options = ("run.name=mixtures", f"data.blend=[{first}],[{second}]", *slurm, "hydra.launcher.dry_run=true")
    monkeypatch.chdir(folder)
    from train.pretrain import main

    code, out, error = call_main(main, "--multirun", *(option for option in SWEEP[:-1] if option != BLEND), *options)
    assert code == 0, error
    names = re.findall(r"^#SBATCH --job-name=(.*)$", out, re.MULTILINE)
    assert len(set(names)) == 2
    for name in names:
        assert re.fullmatch(r"mixtures/blend=_path_source-of-a-mixture-0,weight_1_.*-[0-9a-f]{12}", name)
        assert len(name.removeprefix("mixtures/").encode()) == 200


def test_valid_folder_names_are_not_shortened(tmp_path: Path) -> None:
    from launch.sweep import shorten

    assert shorten("activation_ratio=0.5,seed=1", tmp_path) == "activation_ratio=0.5,seed=1"
    assert shorten("a" * 200, tmp_path) == "a" * 200
    cut = [shorten("ä" * 200 + end, tmp_path) for end in "ab"]
    assert cut[0] != cut[1]
    for name in cut:
        (tmp_path / name).mkdir()
        assert len(name.encode()) <= 200
    # A sweep of an earlier version finds its points.
    (tmp_path / ("b" * 240)).mkdir()
    assert shorten("b" * 240, tmp_path) == "b" * 240


def test_torchrun_around_a_sweep_is_refused(call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    code, _, error = call(call_main, monkeypatch, folder, "run.seed=1,2")
    assert code == 2
    assert "start it without torchrun; hydra.launcher.processes=N" in error


@pytest.mark.parametrize(
    ("experiment", "points", "example"),
    [
        ("k_sweep", 12, "activation_ratio=0.125,seed=3"),
        ("k_sweep_equal_active", 12, "activation_ratio=0.5,seed=1"),
        ("neuron_balance", 9, "activation_ratio=0.25,neuron_balance_form=masked,neuron_balance_coeff=0.01,seed=1"),
        ("gate_activation", 10, "activation_ratio=1,activation=relu_squared,seed=1"),
    ],
)
def test_experiments_are_sweeps(
    call_main: Call, monkeypatch: pytest.MonkeyPatch, folder: Path, experiment: str, points: int, example: str
) -> None:
    from train.pretrain import main

    monkeypatch.chdir(folder)
    slurm = ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=0", "hydra.launcher.processes_per_node=1"]
    seeds = [] if experiment.startswith("k_sweep") else ["run.seed=1"]
    options = (f"experiment={experiment}", BLEND, *slurm, *seeds, "hydra.launcher.dry_run=true")
    code, out, _ = call_main(main, "--multirun", *options)
    assert code == 0
    names = re.findall(r"^#SBATCH --job-name=(.*)$", out, re.MULTILINE)
    assert len(set(names)) == len(names) == points
    assert f"{experiment}/{example}" in names
