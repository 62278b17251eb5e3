import json
from collections.abc import Callable
from pathlib import Path

from configs.run_folder import hold
from launch.status import main

Call = Callable[..., tuple[int, str, str]]


def made(run: Path, state: str, **more: object) -> Path:
    run.mkdir()
    (run / "config.yaml").write_text("training: {steps: 40}\n")
    (run / "status.json").write_text(json.dumps({"state": state, "time": 1.0, **more}))
    records = [{"step": 5, "time": 1.0, "validation/loss": 4.5}, {"step": 10, "time": 2.0, "train/loss": 3.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 1')
    (run / "checkpoints/step-00000005").mkdir(parents=True)
    return run


def test_a_line_a_run(tmp_path: Path, call_main: Call) -> None:
    alive, killed = made(tmp_path / "alive", "running"), made(tmp_path / "killed", "running")
    stopped = made(tmp_path / "stopped", "stopped", reason="SIGNAL")
    attempts = [{"job": "7", "restart": n, "time": 1.0, "outcome": "failed", "step": 3, "reason": "", "requeued": n == 0}
                for n in (0, 1)]  # fmt: skip
    (stopped / "launch").mkdir()
    (stopped / "launch/attempts.jsonl").write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    with hold(alive):
        _, out, _ = call_main(main, "--json", str(alive), str(killed), str(stopped))
        _, table, _ = call_main(main, str(alive), str(killed), str(stopped))
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["state"] for row in rows] == ["running", "ended without a word", "stopped"]
    assert [row["restarts"] for row in rows] == [0, 0, 1]
    expected = {"step": 10, "of": 40, "loss": 3.25, "validation": 4.5, "tokens/s": None, "checkpoint": 5}
    assert all(row | expected == row for row in rows)
    assert len(table.splitlines()) == 4
    assert "3.2500" in table.splitlines()[1]


def test_a_sweeps_folder_stands_for_its_points(tmp_path: Path, call_main: Call) -> None:
    (tmp_path / "sweep").mkdir()
    for seed, state in ((1, "complete"), (2, "failed")):
        made(tmp_path / f"sweep/seed={seed}", state)
    _, out, _ = call_main(main, "--json", str(tmp_path))
    assert [json.loads(line)["run"] for line in out.splitlines()] == [f"{tmp_path}/sweep/seed={seed}" for seed in (1, 2)]


def test_what_is_no_run_is_named(tmp_path: Path, call_main: Call) -> None:
    code, _, error = call_main(main, str(tmp_path / "nothing"))
    assert code == 2
    assert "nothing: no run there" in error
    (tmp_path / "refused").mkdir()
    assert call_main(main, str(tmp_path / "refused"))[0] == 2
    # Beside others it is nothing to speak of.
    assert call_main(main, str(tmp_path / "refused"), str(made(tmp_path / "run", "complete")))[0] == 0
