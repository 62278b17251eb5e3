"""Runs of real processes that tests can observe, signal, kill and restart.

with Job(folder, "run") as job:
    job.wait_for(lambda: job.steps() and job.steps()[-1] >= 3)
    job.ranks()[1].send_signal(signal.SIGKILL)
    code = job.wait()
assert differences(folder, "run") == []                 # against the run called "undisturbed"
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from mone_common.run_records import read_metrics, read_status
from tests.conftest import ROOT
from tests.e2e.test_pretrain import OPTIONS as TINY
from tests.tiny import make_shards

STEPS = 8
METRICS = ("train/loss", "train/grad_norm", "validation/loss", "train/tokens")
UNDISTURBED = "undisturbed"
DEADLINE = 300.0
"""Timeout in seconds, much longer than any wait."""
OPTIONS = [
    *TINY,
    "parallel.expert=2",
    "training.micro_batch_size=1",
    "logging.wandb_mode=disabled",
    "logging.neuron_interval=0",
    "logging.figure_interval=0",
]


def make_data(folder: Path) -> None:
    """Create the two sources that all runs of a folder read."""
    make_shards(folder / "a", name="a")
    make_shards(folder / "b", name="b", seed=1)


class Job:
    """One start of the training command, with torchrun for several processes, and its output in a file.

    faults: for tests.faults.victim; None starts train.pretrain. stdout: another file for the output.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *options: str,
        faults: list[dict[str, Any]] | None = None,
        processes: int = 2,
        launcher: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        stdout: int | None = None,
    ) -> None:
        self.run, self.processes = folder / "runs" / name, processes
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *launcher]
        module = "train.pretrain" if faults is None else "tests.faults.victim"
        data = "data.blend=[{path: a, weight: 0.7}, {path: b, weight: 0.3}]"
        # All child processes inherit this variable, so that orphans are found.
        self.mark = uuid.uuid4().hex
        self.log = folder / f"{name}-{self.mark[:6]}.log"
        with open(self.log, "w") as log:
            self.process = psutil.Popen(
                [
                    *(sys.executable, *(torchrun if processes > 1 else [])),
                    *("-m", module, data, f"run.name={name}", *OPTIONS, *options),
                ],
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "PYTHONUNBUFFERED": "1",
                    "OMP_NUM_THREADS": "1",
                    "MONE_FAULTS": json.dumps(faults or []),
                    **(environment or {}),
                    "MONE_FAULTS_JOB": self.mark,
                },
                stdin=subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def output(self) -> str:
        """The output of all processes so far."""
        return self.log.read_text(errors="replace")

    def everyone(self) -> list[psutil.Process]:
        """All running processes of this job, including stopped ones but not zombies."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                marked = process.environ().get("MONE_FAULTS_JOB") == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by rank."""
        if self.processes == 1:
            return {0: self.process}
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.process.children():
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    if "RANK" in (environment := child.environ()):
                        found[int(environment["RANK"])] = child
        return found

    def steps(self) -> list[int]:
        """Steps whose loss is recorded in the run folder, in order, including earlier starts."""
        return list(recorded(self.run, "train/loss"))

    def ended(self) -> bool:
        """Whether the command has returned."""
        return self.process.poll() is not None

    def wait_for(self, what: Callable[[], object], seconds: float = DEADLINE) -> bool:
        """Wait until `what()` is true and return True; False if the command returned before."""
        began = time.monotonic()
        while not what():
            if self.ended():
                return bool(what())
            assert time.monotonic() - began < seconds, f"timed out\n{self.output()}"
            time.sleep(0.01)
        return True

    def wait_for_step(self, step: int) -> bool:
        """Wait until the loss of this step is recorded."""
        return self.wait_for(lambda: self.steps()[-1:] >= [step])

    def wait(self, seconds: float = DEADLINE) -> int:
        """Exit code of the command. AssertionError if it does not return in time or leaves processes behind."""
        code = self.process.wait(timeout=seconds)
        began = time.monotonic()
        while left := self.everyone():
            assert time.monotonic() - began < 30, f"left behind: {[(p, p.cmdline()) for p in left]}\n{self.output()}"
            time.sleep(0.1)
        return code

    def finish(self, code: int = 0) -> str:
        """Wait for this exit code and return the output."""
        found = self.wait()
        assert found == code, f"exit code {found}, not {code}\n{self.output()}"
        return self.output()

    def end(self) -> None:
        """Kill all running processes of the job."""
        for process in self.everyone():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(psutil.TimeoutExpired):
            self.process.wait(timeout=30)


def codes(output: str) -> set[int]:
    """Exit codes of training processes from the output of torchrun, which itself exits with 1."""
    return {int(code) for code in re.findall(r"exitcode *: (-?\d+)", output)}


def run_to_end(folder: Path, name: str, *options: str, **how: Any) -> str:
    """Run a job, expect success, and return the output."""
    with Job(folder, name, *options, **how) as job:
        return job.finish()


def recorded(run: Path, metric: str) -> dict[int, Any]:
    """A metric by step."""
    return {record["step"]: record[metric] for record in read_metrics(run) if metric in record}


def differences(folder: Path, name: str, reference: str = UNDISTURBED) -> list[str]:
    """Metrics of a run that are not bitwise equal to those of another."""
    one, other = folder / "runs" / name, folder / "runs" / reference
    return [metric for metric in METRICS if recorded(one, metric) != recorded(other, metric)]


def status(folder: Path, name: str) -> dict[str, Any]:
    """The content of status.json."""
    return read_status(folder / "runs" / name)


def checkpoints(folder: Path, name: str) -> list[int]:
    """Steps of the published checkpoints."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "runs" / name / "checkpoints").glob("step-*"))


@contextlib.contextmanager
def mounted(path: Path, megabytes: int) -> Iterator[Path]:
    """A small disk at `path`; subprocess.CalledProcessError if mounting is not permitted."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path)], check=True, capture_output=True)
    try:
        yield path
    finally:
        # Once for the disk and once for each read-only mount of a fault.
        while os.path.ismount(path):
            subprocess.run(["umount", "--lazy", str(path)], check=True)
