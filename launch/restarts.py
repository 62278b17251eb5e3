"""What a Slurm job does about its end: nothing, if the run is complete; else it queues itself again, unless that is in vain.

    python -m launch.restarts begin runs/mine/launch          # at the start of each attempt
    python -m launch.restarts end runs/mine/launch 1          # with the exit code of its training

attempts.jsonl beside the frozen configuration has a line for each attempt's end. Imports no torch: before a pre-emption
seconds count.
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

from mone_common.run_folder import DamagedFile
from mone_common.run_records import examine_lines, is_number, last_step, read_metrics, read_status

ATTEMPTS = "attempts.jsonl"
STOPPED = {
    "SIGNAL": "asked to stop",
    "TIME": "run.time_limit is near",
    "STEP": "run.stop_at_step",
    "LAUNCHER": "torchrun was killed",
}
"""In words, the reasons of train.signals.StopReason for which a run stops in good order."""


@dataclass(frozen=True)
class Attempt:
    """How one start of the job ended."""

    job: str
    restart: int
    """0 for the first start."""
    time: float
    """Of the end, in seconds since 1970."""
    outcome: str
    """complete, stopped (in good order, to be continued) or failed."""
    step: int
    """The last step on record."""
    reason: str
    """Why, in words."""
    requeued: bool
    """Whether the job was queued again."""


def main() -> None:
    """Exit code 0 if the run is complete or goes on, else 1."""
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "begin":
        (folder / "began").write_text(str(_said(folder.parent).get("time", 0.0)))
        return
    attempt = judge(
        folder,
        job=os.environ["SLURM_JOB_ID"],
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        code=int(sys.argv[3]),
        runs=_runs(os.environ["SLURM_JOB_ID"]),
    )
    with open(folder / ATTEMPTS, "a") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")
    print(f"== {attempt.outcome} at step {attempt.step}: {attempt.reason}", flush=True)
    if attempt.requeued:
        print("== queued again", flush=True)
        subprocess.run(["scontrol", "requeue", attempt.job], check=True)
    sys.exit(0 if attempt.requeued or attempt.outcome == "complete" else 1)


def judge(folder: Path, *, job: str, restart: int, code: int, runs: bool) -> Attempt:
    """What this attempt came to; code: exit code of its training, runs: whether Slurm still lets the job run."""
    run = folder.parent
    options = OmegaConf.load(folder / "launch.yaml")
    status, records = _said(run), list[dict[str, Any]]()
    try:
        records = read_metrics(run)
    except DamagedFile as error:
        print(f"== {error}", flush=True)
    # The time that status.json had when this attempt began, not that of a clock, which may be set in between.
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
        again, reason = False, f"{reason}; the attempt before failed at the same step: not tried again"
    return Attempt(job, restart, time.time(), outcome, step, reason, again)


def _said(run: Path) -> dict[str, Any]:
    """`read_status`; of a damaged file nothing, so that the job is judged by its exit code."""
    try:
        return read_status(run)
    except DamagedFile as error:
        print(f"== {error}", flush=True)
        return {}


def read_attempts(folder: Path) -> list[Attempt]:
    """All ended attempts of the jobs of a run, in order; folder: the run's `launch`."""
    return examine_attempts(folder)[0]


def examine_attempts(folder: Path) -> tuple[list[Attempt], str | None]:
    """The same, and what is wrong with the lines left out; DamagedFile if the file cannot be read."""
    return examine_lines(folder / ATTEMPTS, _attempt)


def _attempt(found: Any) -> Attempt | None:
    if not isinstance(found, dict) or found.keys() != {field.name for field in fields(Attempt)}:
        return None
    numbers, texts = (found["restart"], found["time"], found["step"]), (found["job"], found["outcome"], found["reason"])
    fits = all(map(is_number, numbers)) and all(isinstance(text, str) for text in texts)
    return Attempt(**found) if fits and isinstance(found["requeued"], bool) else None


def _runs(job: str) -> bool:
    """Whether Slurm has the job as running. Else it was cancelled, or Slurm itself queues it again.

    In the grace time of a pre-emption it still runs; if nothing is asked for then, it ends for good.
    """
    shown = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True)
    return "JobState=RUNNING" in shown.stdout


if __name__ == "__main__":
    main()
