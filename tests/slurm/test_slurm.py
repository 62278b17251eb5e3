"""Jobs on a real Slurm of two nodes that are stopped, preempted, cancelled or killed end like an undisturbed job."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launch.restarts import Attempt, read_attempts
from mone_common.run_records import read_status
from tests.conftest import ROOT
from tests.faults.jobs import OPTIONS, differences, make_data, recorded
from tests.slurm.cluster import Slurm, cluster, why_not
from tests.tiny import make_shards

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

STEPS = 30
LAUNCH = ("launch.nodes=2", "launch.gpus_per_node=0", "launch.processes_per_node=1", "launch.time=10")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    make_data(folder)
    return folder


def submit(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    data = "data.blend=[{path: a, weight: 0.7}, {path: b, weight: 0.3}]"
    run = [*OPTIONS, f"training.steps={STEPS}", "evaluation.interval=0", "checkpoint.interval=0"]
    return command(folder, "launch.slurm", data, f"run.name={name}", *run, *LAUNCH, *options)


def command(folder: Path, module: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def submitted(folder: Path, name: str, *options: str) -> str:
    """The number of the job."""
    done = submit(folder, name, *options)
    found = re.match(r"job (\d+): 2 processes on 2 nodes", done.stdout)
    assert found, done.stdout + done.stderr
    return found[1]


def until(what: Callable[[], object], log: Path, seconds: float = 600) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < seconds, log.read_text() if log.exists() else "no log"
        time.sleep(0.1)


def log_of(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "launch/log.txt"


def wait_for_step(folder: Path, name: str, step: int) -> None:
    until(lambda: max(recorded(folder / "runs" / name, "train/loss"), default=0) >= step, log_of(folder, name))


def attempts(folder: Path, name: str) -> list[Attempt]:
    return read_attempts(folder / "runs" / name / "launch")


def outcomes(folder: Path, name: str) -> list[tuple[str, bool]]:
    return [(attempt.outcome, attempt.requeued) for attempt in attempts(folder, name)]


def processes_of(job: str, rank: str | None = None) -> list[psutil.Process]:
    """The processes of a job, or of one rank of it."""
    wanted = {"SLURM_JOB_ID": job} | ({} if rank is None else {"RANK": rank})
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if wanted.items() <= process.environ().items():
                found.append(process)
    return found


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, folder: Path) -> str:
    job = submitted(folder, "undisturbed")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log_of(folder, "undisturbed").read_text()
    return job


def test_a_job_trains_on_both_nodes_with_the_code_and_config_of_its_submission(
    slurm: Slurm, folder: Path, undisturbed: str
) -> None:
    run = folder / "runs/undisturbed"
    assert "NodeList=n[1-2]" in slurm.shown(undisturbed)
    assert outcomes(folder, "undisturbed") == [("complete", False)]
    assert f"step {STEPS}/{STEPS}" in log_of(folder, "undisturbed").read_text()
    environment = (run / "environment.json").read_text()
    assert '"world_size": 2' in environment
    assert str(run / "launch") in environment
    for package in ("configs", "train", "mone_model"):
        assert (run / "launch/code" / package / "__init__.py").read_bytes() == (ROOT / package / "__init__.py").read_bytes()


def test_a_job_saves_before_preemption_and_continues_afterwards(slurm: Slurm, folder: Path, undisturbed: str) -> None:
    job = submitted(folder, "preempted", "logging.wandb_mode=offline")
    wait_for_step(folder, "preempted", 5)
    wrap = ["sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    other = subprocess.run(wrap, capture_output=True, text=True, check=True).stdout.strip()
    slurm.wait(other, "COMPLETED")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log_of(folder, "preempted").read_text()
    first, *_, last = attempts(folder, "preempted")
    assert (first.outcome, first.requeued, first.reason) == ("stopped", True, "asked to stop")
    assert 5 <= first.step < STEPS
    assert (last.outcome, last.restart) == ("complete", 1)
    log = log_of(folder, "preempted").read_text()
    assert log.index("asked to stop") < log.index(f"resumed from runs/preempted/checkpoints/step-{first.step:08d}")
    assert differences(folder, "preempted") == []
    wandb = [path.name for path in (folder / "runs/preempted/wandb").glob("offline-run-*")]
    assert len(wandb) == len(attempts(folder, "preempted"))
    assert len({name.rpartition("-")[2] for name in wandb}) == 1, "all starts are one W&B run"


def test_near_its_time_limit_it_continues_in_a_new_start_until_it_is_cancelled(slurm: Slurm, folder: Path) -> None:
    # Slurm's limits are whole minutes. With early notice, the first start has 75 seconds, which busy machines need to start.
    job = submitted(
        folder, "endless", "training.steps=100000", "launch.time=2", "launch.save_seconds=45", "logging.wandb_mode=offline"
    )
    until(lambda: attempts(folder, "endless"), log_of(folder, "endless"))
    (first,) = attempts(folder, "endless")
    assert (first.outcome, first.requeued) == ("stopped", True)
    subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=10"], check=True)
    slurm.wait(job, "RUNNING")
    log = log_of(folder, "endless")
    until(lambda: "resumed from runs/endless/checkpoints" in log.read_text(), log)
    assert "W&B stopped" not in log.read_text(), "W&B must run until it has the last records of the run, which still saves"
    wait_for_step(folder, "endless", first.step + 3)
    again = submit(folder, "endless")
    assert (again.returncode, f"job {job} is queued or running there" in again.stderr) == (2, True)
    subprocess.run(["scancel", job], check=True)
    assert slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED") == "CANCELLED"
    # Only a process of the job could requeue it.
    until(lambda: not processes_of(job), log)
    assert read_status(folder / "runs/endless")["state"] == "stopped", log.read_text()
    assert [attempt.requeued for attempt in attempts(folder, "endless")] == [True, False]
    assert slurm.state(job) == "CANCELLED", "a cancelled job must not be requeued"


def test_a_killed_worker_restarts_the_job(slurm: Slurm, folder: Path, undisturbed: str) -> None:
    job = submitted(folder, "hurt", "checkpoint.interval=10", "launch.max_restarts=0")
    wait_for_step(folder, "hurt", 15)
    processes_of(job, rank="1")[0].kill()
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log_of(folder, "hurt").read_text()
    assert outcomes(folder, "hurt") == [("failed", True), ("complete", False)]
    assert differences(folder, "hurt") == []


def test_a_job_that_fails_twice_at_the_same_step_is_not_restarted(slurm: Slurm, folder: Path) -> None:
    make_shards(folder / "c", name="c")
    job = submitted(folder, "hopeless", "data.blend=[{path: c}]")
    shutil.rmtree(folder / "c")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert outcomes(folder, "hopeless") == [("failed", True), ("failed", False)]
    assert "failed at the same step, so the job is not requeued" in log_of(folder, "hopeless").read_text()


def test_a_sweep_submits_one_job_per_point_and_none_twice(slurm: Slurm, folder: Path) -> None:
    # Two nodes with one munged sometimes lose a launch when two jobs start in the same second.
    launch = [*LAUNCH, "launch.sbatch=[--exclusive]"]
    launcher = ["hydra/launcher=slurm", *(f"hydra.{option.replace('launch.', 'launcher.')}" for option in launch)]
    sweep = ["--multirun", "run.name=swept", "run.seed=1,2", "data.blend=[{path: a}]", *OPTIONS, *launcher]

    def submit_sweep(*options: str) -> str:
        done = command(folder, "train.pretrain", *sweep, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    jobs = re.findall(r"^seed=(\d): submitted, job (\d+)$", submit_sweep(), re.MULTILINE)
    assert [seed for seed, _ in jobs] == ["1", "2"]
    again = submit_sweep()
    for seed, job in jobs:
        assert f"seed={seed}: submitted, job {job} is queued or running there" in again
        assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", log_of(folder, f"swept/seed={seed}").read_text()
        assert outcomes(folder, f"swept/seed={seed}") == [("complete", False)]
    assert submit_sweep().count("complete, finished before") == 2
    refused = command(folder, "train.pretrain", *sweep, "hydra.launcher.save_seconds=601")
    assert refused.returncode == 2
    assert "hydra.launcher.save_seconds=601: leaves no time for training within hydra.launcher.time=10" in refused.stderr
    elsewhere = command(folder, "launch.slurm", "--multirun", "run.seed=1,2", *LAUNCH)
    assert "`mone-pretrain --multirun`, with hydra/launcher=local or slurm" in elsewhere.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["parallel.expert=3"], "must divide the number of processes, 2"),
        (["data.blend=[{path: nowhere}]"], "nowhere"),
        (["launch.processes_per_node=null"], "launch.gpus_per_node=0: without GPUs, set the number of processes"),
        (["launch.save_seconds=601"], "leaves no time for training within launch.time=10 (600 seconds)"),
        (["launch.time=soon"], "launch.time=soon: must have Slurm's format"),
    ],
)
def test_an_invalid_run_is_refused_before_it_is_queued(folder: Path, options: list[str], message: str) -> None:
    done = submit(folder, "refused", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (folder / "runs/refused").exists()


def test_a_refusal_by_slurm_is_reported(slurm: Slurm, folder: Path) -> None:
    done = submit(folder, "lost", "launch.partition=nowhere")
    assert done.returncode == 1
    assert "invalid partition specified" in done.stderr


def test_every_value_reaches_slurm_and_the_job_unchanged(slurm: Slurm, folder: Path) -> None:
    awkward = """it's "a" $HOME `id` #1 \\ %j"""
    override = "'" + awkward.replace("'", "\\'") + "'"
    shown = submit(folder, f"{override}", "run.dir=runs/awkward", f"+launch.environment.MARK={override}", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert not (folder / "runs/awkward").exists()
    (export,) = [line for line in shown.stdout.splitlines() if line.startswith("export MARK=")]
    assert shlex.split(export)[1] == f"MARK={awkward}"
    script = "\n".join(line for line in shown.stdout.splitlines() if line.startswith(("#!", "#SBATCH")))
    held = ["sbatch", "--parsable", "--hold"]
    job = subprocess.run(held, input=script + "\n", capture_output=True, text=True, check=True).stdout.strip()
    assert f"JobName={awkward} UserId" in slurm.shown(job)
    subprocess.run(["scancel", job], check=True)
