"""Faults of a run, with real processes. docs/faults.md has the table; the rounds are in rounds.py."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mone_common.run_records import read_metrics, read_status
from tests.conftest import ROOT
from tests.faults.jobs import (
    STEPS,
    UNDISTURBED,
    Job,
    checkpoints,
    codes,
    differences,
    make_data,
    mounted,
    recorded,
    run_to_end,
    status,
)
from tests.faults.rounds import Round, play
from tests.faults.wandb_server import Server
from tests.tiny import make_shards

FEW_SAVES = "checkpoint.interval=4"
HUNG = ("run.timeout_minutes=0.3", "checkpoint.interval=0")
"""18 seconds are several times the longest phase, apart from the first save, which can be slow on busy machines."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and an undisturbed run."""
    folder = tmp_path_factory.mktemp("faults")
    make_data(folder)
    run_to_end(folder, UNDISTURBED)
    return folder


@pytest.fixture
def disk(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A run folder named after the test, on a separate disk of 8 MB, which holds about six checkpoints."""
    try:
        # Brackets are syntax in an option.
        with mounted(folder / "runs" / re.sub(r"\W+", "-", request.node.name).strip("-"), megabytes=8) as path:
            yield path
    except subprocess.CalledProcessError as error:
        pytest.skip(f"mounting is not permitted: {error.stderr}")


def fault(name: str, **arguments: Any) -> dict[str, Any]:
    """One fault for tests.faults.victim."""
    return {"fault": name, **arguments}


@pytest.mark.parametrize(
    "hurt",
    [
        Round("rank 1", "save", step=0, delay=0.05, async_save=False),
        Round("rank 0", "save", step=2, delay=0.05, async_save=True),
        # A step without a save. Only synchronous saves take place within a step.
        Round("all", "step", step=3, delay=0.0, async_save=False),
    ],
    ids=str,
)
def test_a_killed_run_ends_like_an_uninterrupted_one(folder: Path, hurt: Round) -> None:
    outcome = play(folder, f"killed-{hurt.victims.replace(' ', '-')}", hurt)
    assert outcome.problem == ""
    assert outcome.torn == (hurt.moment == "save")


def test_the_launcher_restarts_killed_workers_by_itself(folder: Path) -> None:
    temporary = folder / "tmp"
    temporary.mkdir()
    with Job(folder, "restarted", launcher=("--max-restarts=3",), environment={"TMPDIR": str(temporary)}) as job:
        assert job.wait_for_step(3)
        job.ranks()[1].send_signal(signal.SIGKILL)
        output = job.finish()
    assert output.count("resumed from") == 1
    assert differences(folder, "restarted") == []
    assert [path.name for path in temporary.iterdir() if path.name.startswith(("pymp-", "torchelastic_"))] == []


LEAVES = """
import os, signal
from train.signals import StopRequest

class Asked:  # after Python has removed the signal handlers
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGUSR1):
        kill(process, number)

asked = Asked()
StopRequest(time_limit=60)
"""


def test_a_second_signal_does_not_kill_an_exiting_process() -> None:
    assert subprocess.run([sys.executable, "-c", LEAVES], cwd=ROOT).returncode == 0


def test_a_signal_to_one_rank_or_the_time_limit_saves_and_stops_all(folder: Path) -> None:
    # SIGTERM after a save to a rank and its children, as from a launcher; they include a data loader worker.
    for number, rank, step in ((signal.SIGUSR1, 0, 1), (signal.SIGTERM, 1, 3)):
        with Job(folder, "stopped", "data.num_workers=1", faults=[fault("slow", seconds=0.5)]) as job:
            assert job.wait_for_step(step)
            victim = job.ranks()[rank]
            if number == signal.SIGTERM:
                os.killpg(os.getpgid(victim.pid), number)
            else:
                victim.send_signal(number)
            output = job.finish()
        stopped = status(folder, "stopped")
        assert (stopped["state"], stopped["reason"]) == ("stopped", "SIGNAL")
        assert step <= stopped["step"] < STEPS
        assert checkpoints(folder, "stopped")[-1] == stopped["step"]
        assert "the same command continues" in output
    # torchrun is killed: no launcher ends its processes. Its store ends with it, also for the save.
    with Job(folder, "stopped", faults=[fault("slow", seconds=0.5)]) as job:
        assert job.wait_for(lambda: "resumed from" in job.output())
        job.process.send_signal(signal.SIGKILL)
        job.finish(code=-signal.SIGKILL)
    stopped = status(folder, "stopped")
    assert (stopped["state"], stopped["reason"]) == ("stopped", "LAUNCHER")
    assert checkpoints(folder, "stopped")[-1] == stopped["step"] < STEPS
    # The limit counts from the start of the process and spares ten seconds for a save: two steps at most.
    # The newest checkpoint is damaged: the run saves earlier steps and keeps the checkpoint resumed from.
    *_, before, newest = sorted((folder / "runs/stopped/checkpoints").glob("step-*"))
    os.truncate(next(newest.glob("*.distcp")), 10)
    options = ("run.time_limit=00:00:30", "checkpoint.keep_last=1")
    output = run_to_end(folder, "stopped", *options, faults=[fault("slow", seconds=8)])
    assert re.search(rf"skipped runs/stopped/checkpoints/{newest.name}: damaged: .* has 10 bytes", output)
    assert f"resumed from runs/stopped/checkpoints/{before.name} " in output
    assert before.exists()
    assert status(folder, "stopped")["reason"] == "TIME"
    assert status(folder, "stopped")["step"] in checkpoints(folder, "stopped")
    # The reader of the output has ended.
    reader, writer = os.pipe()
    os.close(reader)
    run_to_end(folder, "stopped", stdout=writer)
    os.close(writer)
    assert status(folder, "stopped")["state"] == "complete"
    assert differences(folder, "stopped") == []


def test_steps_that_are_not_finite_or_spike_on_one_rank_are_dropped_and_counted(folder: Path) -> None:
    faults = [
        fault("poison_loss", rank=1, steps=[3], factor="nan"),
        fault("poison_gradient", rank=0, steps=[5]),
        fault("poison_loss", rank=1, steps=[7], factor="100"),
    ]
    guard = ("guard.spike_sigma=1000", "guard.spike_window=4", "checkpoint.interval=0")
    output = run_to_end(folder, "poisoned", *guard, faults=faults)
    assert status(folder, "poisoned")["state"] == "complete"
    dropped = recorded(folder / "runs/poisoned", "train/dropped_steps")
    assert [dropped[step] for step in range(1, STEPS + 1)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert re.findall(r"step (\d): dropped", output) == ["3", "5", "7"]
    assert "a spike" in output
    losses, undisturbed = (recorded(folder / "runs" / name, "train/loss") for name in ("poisoned", UNDISTURBED))
    assert losses[2] == undisturbed[2]
    # The weights did not change.
    assert abs(losses[STEPS] - undisturbed[STEPS]) < 0.1


def test_a_run_that_only_diverges_ends_with_code_3_and_its_last_checkpoint_continues(folder: Path) -> None:
    poison = fault("poison_loss", rank=1, steps=list(range(4, 100)), factor="inf")
    with Job(folder, "diverged", "guard.max_dropped=2", faults=[poison]) as job:
        output = job.finish(code=1)
    assert 3 in codes(output)
    assert "guard.max_dropped=2" in output
    assert status(folder, "diverged")["state"] == "failed"
    # The checkpoint of step 4 has the weights of step 3 and records that step 4 was dropped.
    latest = checkpoints(folder, "diverged")[-1]
    run_to_end(folder, "diverged", "guard.max_dropped=2")
    assert status(folder, "diverged")["state"] == "complete"
    assert recorded(folder / "runs/diverged", "train/dropped_steps")[STEPS] == latest - 3


@pytest.fixture(scope="module")
def hung(folder: Path) -> Iterator[dict[str, Job]]:
    """Two runs that hang, at the same time, since they mostly wait."""
    impatient = fault("lose_patience", step=2, seconds=5)
    # The runs compete for processors, so that one hangs later.
    with Job(folder, "asleep", *HUNG, faults=[fault("sleep_reading", rank=1, step=3), impatient]) as asleep:
        asleep.wait_for_step(2)
        with Job(folder, "frozen", *HUNG, faults=[fault("slow", seconds=0.2), impatient]) as frozen:
            frozen.wait_for_step(3)
            victim = frozen.ranks()[0]
            victim.send_signal(signal.SIGSTOP)
            try:
                yield {"asleep": asleep, "frozen": frozen}
            finally:
                if victim.is_running():
                    victim.send_signal(signal.SIGCONT)


def test_a_hanging_rank_is_reported_with_its_phase_and_the_run_ends(hung: dict[str, Job]) -> None:
    output = hung["asleep"].finish(code=1)
    assert "rank 1 holds up the others" in output
    assert re.search(r"rank 1 on \S+: step 3, reading data, for \d+ s\n", output)
    assert "in getitem" in output  # from the stack
    assert 4 in codes(output)
    ended = read_status(hung["asleep"].run)
    assert (ended["state"], ended["exit_code"]) == ("failed", 4)
    assert "rank 1 holds up the others" in ended["reason"]


def test_a_stopped_rank_is_reported_and_the_run_ends_without_leftovers(hung: dict[str, Job]) -> None:
    output = hung["frozen"].finish(code=1)
    assert "rank 0 holds up the others" in output
    assert re.search(r"rank 0 (on \S+: step \d, .*; its process has not responded for \d+ s|has never responded)", output)
    assert 4 in codes(output)
    # Rank 0, which normally writes it, is stopped.
    assert read_status(hung["frozen"].run)["exit_code"] == 4


def test_a_full_disk_loses_checkpoints_but_no_records(folder: Path, disk: Path) -> None:
    # The disk is full from step 3 to 6; the last checkpoint has too little space.
    faults = [
        fault("fill_disk", path=str(disk), step=3, until=7, leave=0),
        fault("fill_disk", path=str(disk), step=8, until=9, leave=300_000),
    ]
    # Records of all layers and neurons do not fit into the last page of metrics.jsonl.
    options = ("checkpoint.keep_last=1", "logging.neuron_interval=1", "logging.wandb_mode=offline")
    with Job(folder, disk.name, *options, faults=faults) as job:
        output = job.finish(code=1)
    assert output.count("W&B's offline record") == 1
    assert re.search(r"step 4: cannot prepare .*; training continues", output)
    assert "records stay in memory" in output
    assert re.search(r"error: cannot prepare .*checkpoints: .* are free, about", output)
    assert status(folder, disk.name)["state"] == "failed"
    assert checkpoints(folder, disk.name) == [2]
    assert list(recorded(disk, "train/loss")) == list(range(1, STEPS + 1))
    (disk / "filler").unlink()
    run_to_end(folder, disk.name)
    assert checkpoints(folder, disk.name) == [2, 6, 8], "the one resumed from stays"
    assert differences(folder, disk.name) == []


@pytest.mark.parametrize("async_save", ["false", "true"])
def test_a_disk_that_fills_during_a_save_loses_only_that_checkpoint(folder: Path, disk: Path, async_save: str) -> None:
    # Half of a checkpoint fits at step 4, and half of the last one at step 8.
    faults = [
        fault("overstate_free_space"),
        fault("fill_disk", path=str(disk), step=3, until=5, leave=400_000),
        fault("fill_disk", path=str(disk), step=8, until=9, leave=400_000),
    ]
    if async_save == "true":
        faults.append(fault("slow", seconds=1.5))  # so that a save ends before the disk is filled for the next one
    options = (f"checkpoint.async_save={async_save}", "checkpoint.keep_last=1")
    with Job(folder, disk.name, *options, faults=faults) as job:
        output = job.finish(code=1)
    assert re.search(r"step [4-6]: no checkpoint in .*: rank \d: .*; training continues", output)
    assert re.search(r"error: no checkpoint in .*: rank \d: ", output)
    assert checkpoints(folder, disk.name) == [6]
    assert not list((disk / "checkpoints").glob(".unfinished-step-*"))
    (disk / "filler").unlink()
    run_to_end(folder, disk.name, *options)
    assert differences(folder, disk.name) == []


def test_a_failed_write_on_rank_0_loses_only_that_checkpoint(folder: Path) -> None:
    names = {"common.pt": 2, ".metadata.tmp": 4, "metadata.json": 6}
    output = run_to_end(folder, "obstructed", faults=[fault("obstruct", names=names)])
    assert len(re.findall(r"step [246]: cannot (?:begin|publish) .*; training continues", output)) == 3
    assert checkpoints(folder, "obstructed") == [8]
    assert differences(folder, "obstructed") == []


def test_an_unwritable_run_folder_is_refused(folder: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with Job(folder, disk.name, "parallel.expert=1", processes=1) as job:
        output = job.finish(code=2)
    assert f"error: run.dir=runs/{disk.name}: cannot be written" in output
    assert "Traceback" not in output


def test_a_read_only_run_folder_loses_no_checkpoint(folder: Path, disk: Path) -> None:
    with Job(folder, disk.name, faults=[fault("become_read_only", path=str(disk), step=5)]) as job:
        output = job.finish(code=1)
    assert "Read-only file system" in output
    assert "step 6: cannot prepare" in output
    assert "training continues" in output
    subprocess.run(["umount", str(disk)], check=True)
    assert checkpoints(folder, disk.name) == [2, 4]
    run_to_end(folder, disk.name)
    assert differences(folder, disk.name) == []


def test_a_changed_shard_ends_the_run_without_a_save(folder: Path) -> None:
    shard = make_shards(folder / "mutable", name="mutable") / "train-00000.bin"
    blend = "data.blend=[{path: mutable}]"
    with Job(folder, "altered", blend, faults=[fault("alter", path=str(shard), step=3, rank=1)]) as job:
        output = job.finish(code=1)
    assert 2 in codes(output)
    assert re.search(r"error: data.blend: mutable/train-00000.bin changed while it was read; not saved", output)
    assert "Traceback" not in output.partition("ChildFailedError")[0].partition("Traceback")[0]
    assert checkpoints(folder, "altered") == [2]


def test_a_lost_wandb_server_loses_no_record_and_does_not_block(folder: Path) -> None:
    server = Server()
    environment = {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "0" * 40,
        "HOME": str(folder),
        "WANDB_FINISH_TIMEOUT": "5",  # the default is for real networks
    }
    options = ("parallel.expert=1", "logging.wandb_mode=online", "logging.neuron_interval=4", FEW_SAVES)
    try:
        with Job(
            folder, "offline", *options, processes=1, environment=environment, faults=[fault("slow", seconds=0.5)]
        ) as job:
            assert job.wait_for_step(2)
            server.close()
            output = job.finish()
    finally:
        server.server_close()
    assert any("UpsertBucket" in query for query in server.asked)
    assert "could not start" not in output
    records = read_metrics(folder / "runs/offline")
    assert [record["step"] for record in records if "train/loss" in record] == list(range(1, STEPS + 1))
    assert status(folder, "offline")["state"] == "complete"
