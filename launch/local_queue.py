"""Runs points on this machine, `jobs` at a time; each is a torchrun process with its share of the cores or GPUs.

outcomes = run_points(points, LocalOptions(jobs=2))
"""

import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.frozen import freeze
from launch.options import LocalOptions
from launch.sweep import Outcome, Point, busy, finished, validation_loss
from mone_common.console import UserError
from mone_common.run_records import last_step, read_metrics, read_status
from mone_common.text import clock

NOT_INHERITED = ("HEAD", "NODE_RANK", "ADDRESS", "WANDB_SERVICE")
"""Environment variables of a launch on several machines or of this process's W&B, which must not affect a run."""
LOG = "log.txt"
HEADER = "== started"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Share:
    """The cores and GPUs of one of the concurrent runs."""

    processes: int
    cores: list[int]
    gpus: list[str]
    """Names as in CUDA_VISIBLE_DEVICES; one for each process."""


def shares(options: LocalOptions) -> list[Share]:
    """One share for each concurrent run, all with the same number of processes; UserError if there are too few GPUs."""
    import torch  # takes seconds

    cores, number, jobs = sorted(os.sched_getaffinity(0)), torch.cuda.device_count(), options.jobs
    processes = options.processes or max(1, number // jobs)
    if number and jobs * processes > number:
        raise UserError(
            f"hydra.launcher.jobs={jobs}: {jobs} runs of {processes} processes need {jobs * processes} GPUs, "
            f"and there are {number}; use at most hydra.launcher.jobs={max(1, number // processes)}"
        )
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(number)))).split(",")[:number]
    # If there are more runs than cores, every run may use all cores.
    own = len(cores) >= jobs
    return [
        Share(
            processes,
            cores[job * len(cores) // jobs : (job + 1) * len(cores) // jobs] if own else cores,
            gpus[job * processes : (job + 1) * processes],
        )
        for job in range(jobs)
    ]


def run_points(points: Sequence[Point], options: LocalOptions) -> list[Outcome]:
    """Run the points that are not finished and print progress; a failed point does not stop the others.

    At the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP (unless ignored, as under nohup) the runs save and stop. A second signal
    kills them.
    """
    queue = _Queue(points, options)
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, queue.on_signal) for number in handled}
    try:
        return queue.run()
    finally:
        for run in queue.running:  # not empty only after an exception
            _ask_to_stop(run)
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Run:
    number: int
    point: Point
    share: Share
    process: subprocess.Popen[bytes]
    began: float
    """Monotonic time in seconds."""
    status_before: dict[str, Any]
    first_step: int


class _Queue:
    def __init__(self, points: Sequence[Point], options: LocalOptions) -> None:
        self.points, self.options = points, options
        self.outcomes = {number: finished(point) for number, point in enumerate(points) if point.finished}
        self.waiting = [number for number in range(len(points)) if number not in self.outcomes]
        self.free, self.running = shares(options), list[_Run]()
        self.signals, self.began, self.steps_done = 0, time.monotonic(), 0

    def on_signal(self, number: int, frame: object) -> None:
        self.signals += 1

    def run(self) -> list[Outcome]:
        if self.outcomes:
            print(f"{len(self.outcomes)} of {len(self.points)} points are finished already", flush=True)
        for number in list(self.waiting):
            if taken := busy(self.points[number]):
                self.waiting.remove(number)
                self.outcomes[number] = Outcome("failed", taken.reason)
        for number in self.waiting:
            # Copy the code for all points now: the queue may run for days, and all its points must run the same code.
            freeze(self.points[number].config, {})
        reported = asked = time.monotonic()
        while self.running or (self.waiting and not self.signals):
            while self.free and self.waiting and not self.signals:
                number = self.waiting.pop(0)
                try:
                    self._start(number, self.free[0])
                    self.free.pop(0)
                except OSError as error:
                    self.outcomes[number] = Outcome("failed", f"could not be started: {error}")
            time.sleep(0.2)
            for run in [run for run in self.running if run.process.poll() is not None]:
                self._end(run)
            now = time.monotonic()
            if self.signals and now - asked > 2:
                # Repeat the signal: a process that has just started has no handler yet.
                asked = now
                for run in self.running:
                    _ask_to_stop(run) if self.signals == 1 else _kill(run)
            if self.running and now - reported > self.options.report_seconds:
                reported = now
                self._print_progress()
        for number in self.waiting:
            self.outcomes[number] = Outcome("stopped", "not started")
        return [self.outcomes[number] for number in range(len(self.points))]

    def _start(self, number: int, share: Share) -> None:
        point = self.points[number]
        frozen, first_step = (point.folder / "launch").absolute(), _last_step(point.folder)
        before = read_status(point.folder)
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        environment |= {
            "PYTHON": sys.executable,
            "PYTHONUNBUFFERED": "1",
            "NODES": "1",
            "PROCESSES": str(share.processes),
            "RESTARTS": "0",
        }
        if share.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.gpus)
        with open(point.folder / LOG, "ab") as log:
            log.write(f"{HEADER} {datetime.datetime.now().isoformat(timespec='seconds')}\n".encode())
            log.flush()
            process = subprocess.Popen(
                ["bash", str(frozen / "code/launch/torchrun"), "--config-dir", str(frozen), "--config-name", "frozen"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # so that Ctrl-C reaches only this process, which then stops the runs
            )
        os.sched_setaffinity(process.pid, share.cores)
        self.running.append(_Run(number, point, share, process, time.monotonic(), before, first_step))
        self._print(number, f"started, {point.folder / LOG}")

    def _end(self, run: _Run) -> None:
        self.running.remove(run)
        self.free.append(run.share)
        folder = run.point.folder
        status = read_status(folder)
        state = status.get("state") if status != run.status_before else None
        took = clock(time.monotonic() - run.began)
        if state == "complete":
            loss = validation_loss(folder)
            outcome = Outcome("complete", f"in {took}" + (f", validation loss {loss:.4f}" if loss is not None else ""), loss)
        elif state == "stopped":
            outcome = Outcome("stopped", f"at step {status['step']} after {took}")
        else:
            reason = status["reason"] if state == "failed" else last_error(folder / LOG)
            code = run.process.returncode
            outcome = Outcome("failed", f"{reason or f'exit code {code}'} (after {took}; {folder / LOG})")
        self.outcomes[run.number] = outcome
        self.steps_done += max(0, _last_step(folder) - run.first_step)
        self._print(run.number, f"{outcome.state} {outcome.reason}")

    def _print(self, number: int, text: str) -> None:
        width = len(str(len(self.points)))
        print(f"[{number + 1:>{width}}/{len(self.points)}] {self.points[number].name}: {text}", flush=True)

    def _print_progress(self) -> None:
        steps = {run.number: _last_step(run.point.folder) for run in self.running}
        done = self.steps_done + sum(steps[run.number] - run.first_step for run in self.running)
        left = sum(run.point.config.training.steps - steps[run.number] for run in self.running)
        left += sum(
            self.points[number].config.training.steps - _last_step(self.points[number].folder) for number in self.waiting
        )
        eta = clock((time.monotonic() - self.began) * left / done) if done > 0 else "?"
        now = ", ".join(f"{run.point.name} {steps[run.number]}/{run.point.config.training.steps}" for run in self.running)
        counts = f"{len(self.outcomes)} of {len(self.points)} points done, {len(self.waiting)} waiting"
        print(f"{counts}; running {now}; ETA {eta}", flush=True)


def _ask_to_stop(run: _Run) -> None:
    """Signal the training processes, which are children of torchrun in sessions of their own; torchrun ignores SIGUSR1."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for worker in psutil.Process(run.process.pid).children():
            worker.send_signal(signal.SIGUSR1)


def _kill(run: _Run) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(run.process.pid)
        for process in [*agent.children(recursive=True), agent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _last_step(folder: Path) -> int:
    return last_step(read_metrics(folder))


def last_error(log: Path) -> str | None:
    """The last `error: ` line of a log since the last start."""
    text = log.read_text(errors="replace") if log.exists() else ""
    since_start = text.rpartition(f"{HEADER} ")[2]
    found = [line for line in since_start.splitlines() if line.startswith("error: ")]
    return found[-1].removeprefix("error: ") if found else None
