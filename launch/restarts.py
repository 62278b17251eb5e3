"""Decides at the end of a Slurm job whether to requeue it: only if the run is incomplete and a restart can help.

    python -m launch.restarts begin runs/mine/launch          # at the start of each attempt
    python -m launch.restarts end runs/mine/launch 1          # with the exit code of its training

attempts.jsonl, in the same folder as the frozen configuration, has one line for each ended attempt. This module does not
import torch, because little time is left before a pre-emption.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mone_common.checks import is_number
from mone_common.run_folder import DamagedFile
from mone_common.run_records import examine_lines, last_step, read_metrics, read_status

ATTEMPTS = "attempts.jsonl"
STOPPED = {
    "SIGNAL": "asked to stop",
    "TIME": "run.time_limit is near",
    "STEP": "run.stop_at_step",
    "LAUNCHER": "torchrun was killed",
}
"""Descriptions of the train.signals.StopReason values after which a run can continue."""


@dataclass(frozen=True)
class Attempt:
    """How one start of the job ended."""

    job: str
    restart: int
    """0 for the first start."""
    time: float
    """End of the attempt, in seconds since 1970."""
    outcome: str
    """complete, stopped (saved, can continue) or failed."""
    step: int
    """The last recorded step."""
    reason: str
    """Reason of the outcome."""
    requeued: bool
    """Whether the job was requeued."""


def main() -> None:
    """Record how the attempt ended and requeue the job if needed; exit code 0 if complete or requeued, else 1."""
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "begin":
        (folder / "began").write_text(str(_status(folder.parent).get("time", 0.0)))
        return
    attempt = judge(
        folder,
        job=os.environ["SLURM_JOB_ID"],
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        code=int(sys.argv[3]),
        runs=_is_running(os.environ["SLURM_JOB_ID"]),
    )
    with open(folder / ATTEMPTS, "a") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")
    print(f"== {attempt.outcome} at step {attempt.step}: {attempt.reason}", flush=True)
    if attempt.requeued:
        print("== requeued", flush=True)
        subprocess.run(["scontrol", "requeue", attempt.job], check=True)
    sys.exit(0 if attempt.requeued or attempt.outcome == "complete" else 1)


def judge(folder: Path, *, job: str, restart: int, code: int, runs: bool) -> Attempt:
    """The outcome of this attempt; code: exit code of its training, runs: whether the job is still running in Slurm."""
    run = folder.parent
    options = OmegaConf.load(folder / "launch.yaml")
    status, records = _status(run), list[dict[str, Any]]()
    try:
        records = read_metrics(run)
    except DamagedFile as error:
        print(f"== {error}", flush=True)
    # `began` has the time in status.json at the start of this attempt; the clock may have been set since.
    if status.get("time", 0.0) == float((folder / "began").read_text()):
        status = {}  # of an earlier attempt
    state, step = status.get("state"), last_step(records)
    outcome, again, reason = "failed", True, f"training ended with exit code {code}"
    if state == "complete":
        outcome, again, reason = "complete", False, "all steps are done"
    elif state == "stopped":
        outcome, again = "stopped", status["reason"] != "STEP"
        reason = STOPPED[status["reason"]]
    elif state == "failed":
        reason = status["reason"]
        again = status["exit_code"] not in (2, 3)
    if not again:
        return Attempt(job, restart, time.time(), outcome, step, reason, False)
    earlier = read_attempts(folder)
    if not runs:
        again, reason = False, f"{reason}; Slurm has ended the job"
    elif restart >= options.max_requeues:
        again, reason = False, f"{reason}; launch.max_requeues={options.max_requeues} is reached"
    elif outcome == "failed" and earlier and (earlier[-1].outcome, earlier[-1].step) == ("failed", step):
        again, reason = False, f"{reason}; the previous attempt failed at the same step, so the job is not requeued"
    return Attempt(job, restart, time.time(), outcome, step, reason, again)


def _status(run: Path) -> dict[str, Any]:
    """`read_status`, or {} for a damaged file; then the exit code decides."""
    try:
        return read_status(run)
    except DamagedFile as error:
        print(f"== {error}", flush=True)
        return {}


def read_attempts(folder: Path) -> list[Attempt]:
    """All ended attempts of the jobs of a run, in order; folder: the run's `launch`."""
    return examine_attempts(folder)[0]


def examine_attempts(folder: Path) -> tuple[list[Attempt], str | None]:
    """`read_attempts`, and a description of the damaged lines; DamagedFile if the file cannot be read."""
    return examine_lines(folder / ATTEMPTS, _attempt)


def _attempt(found: Any) -> Attempt | None:
    if not isinstance(found, dict) or found.keys() != {field.name for field in fields(Attempt)}:
        return None
    numbers, texts = (found["restart"], found["time"], found["step"]), (found["job"], found["outcome"], found["reason"])
    fits = all(map(is_number, numbers)) and all(isinstance(text, str) for text in texts)
    return Attempt(**found) if fits and isinstance(found["requeued"], bool) else None


def _is_running(job: str) -> bool:
    """Whether Slurm lists the job as running; if not, it was cancelled, or Slurm requeues it.

    A job in the grace time of a pre-emption is still running, and ends for good unless it is requeued.
    """
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True)
    return "JobState=RUNNING" in shown.stdout


if __name__ == "__main__":
    main()
