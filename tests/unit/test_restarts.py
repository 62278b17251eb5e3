import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launch.restarts import ATTEMPTS, Attempt, judge


def folder_of_a_run(run: Path, *, step: int, status: dict[str, Any] | None, earlier: list[Attempt]) -> Path:
    folder = run / "launch"
    folder.mkdir(parents=True)
    (folder / "began").write_text("100.0")
    (folder / "launch.yaml").write_text("max_requeues: 3\n")
    (folder / ATTEMPTS).write_text("".join(json.dumps(asdict(attempt)) + "\n" for attempt in earlier))
    (run / "metrics.jsonl").write_text(json.dumps({"step": step, "train/loss": 1.0}) + "\n")
    if status is not None:
        (run / "status.json").write_text(json.dumps({"time": 200.0} | status))
    return folder


def failed(step: int) -> Attempt:
    return Attempt("1", 0, 50.0, "failed", step, "", True)


@pytest.mark.parametrize(
    ("status", "how", "outcome", "requeued"),
    [
        ({"state": "complete"}, {}, "complete", False),
        ({"state": "stopped", "reason": "SIGNAL"}, {}, "stopped", True),
        ({"state": "stopped", "reason": "TIME"}, {}, "stopped", True),
        ({"state": "stopped", "reason": "STEP"}, {}, "stopped", False),
        ({"state": "stopped", "reason": "SIGNAL"}, {"runs": False}, "stopped", False),
        ({"state": "stopped", "reason": "SIGNAL"}, {"restart": 3}, "stopped", False),
        ({"state": "failed", "reason": "RuntimeError", "exit_code": 1}, {}, "failed", True),
        ({"state": "failed", "reason": "Diverged", "exit_code": 3}, {}, "failed", False),
        ({"state": "running"}, {}, "failed", True),  # killed
        (None, {}, "failed", True),  # ended before it wrote a status
        ({"state": "stopped", "reason": "LAUNCHER"}, {}, "stopped", True),
        # The status of an earlier attempt does not count, even if the clock was set back in between.
        ({"state": "stopped", "reason": "SIGNAL", "time": 100.0}, {}, "failed", True),
        ({"state": "stopped", "reason": "STEP", "time": 60.0}, {}, "stopped", False),
        ({"state": "running"}, {"earlier": [failed(20)]}, "failed", False),
        ({"state": "running"}, {"earlier": [failed(10)]}, "failed", True),
        ({"state": "stopped", "reason": "SIGNAL"}, {"earlier": [failed(20)]}, "stopped", True),
    ],
)
def test_a_job_restarts_unless_it_makes_no_progress(
    tmp_path: Path, status: dict[str, Any] | None, how: dict[str, Any], outcome: str, requeued: bool
) -> None:
    options: dict[str, Any] = {"restart": 1, "runs": True, "earlier": []} | how
    folder = folder_of_a_run(tmp_path / "run", step=20, status=status, earlier=options.pop("earlier"))
    attempt = judge(folder, job="1", code=1, **options)
    assert (attempt.outcome, attempt.requeued, attempt.step) == (outcome, requeued, 20)


def test_damaged_files_do_not_prevent_a_restart(tmp_path: Path) -> None:
    folder = folder_of_a_run(tmp_path / "run", step=20, status=None, earlier=[failed(10)])
    (folder.parent / "status.json").write_text('{"state": "stop')
    with open(folder / ATTEMPTS, "a") as file:
        file.write('{"job": 5}\ngarbage\n')
    attempt = judge(folder, job="1", restart=1, code=1, runs=True)
    assert (attempt.outcome, attempt.requeued, attempt.step) == ("failed", True, 20)
