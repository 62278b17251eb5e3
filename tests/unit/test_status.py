import json
import sys
from pathlib import Path

import pytest

from configs.run_folder import hold
from launch.status import main


def made(run: Path, state: str, **more: object) -> Path:
    run.mkdir()
    (run / "config.yaml").write_text("training: {steps: 40}\n")
    (run / "status.json").write_text(json.dumps({"state": state, "time": 1.0, **more}))
    records = [{"step": 5, "time": 1.0, "validation/loss": 4.5}, {"step": 10, "time": 2.0, "train/loss": 3.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 1')
    (run / "checkpoints/step-00000005").mkdir(parents=True)
    return run


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["status", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_a_line_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    alive, killed = made(tmp_path / "alive", "running"), made(tmp_path / "killed", "running")
    stopped = made(tmp_path / "stopped", "stopped", reason="SIGNAL")
    attempts = [{"job": "7", "restart": n, "time": 1.0, "outcome": "failed", "step": 3, "reason": "", "requeued": n == 0}
                for n in (0, 1)]  # fmt: skip
    (stopped / "launch").mkdir()
    (stopped / "launch/attempts.jsonl").write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    with hold(alive):
        out = shown(monkeypatch, capsys, "--json", alive, killed, stopped)
        table = shown(monkeypatch, capsys, alive, killed, stopped)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["state"] for row in rows] == ["running", "ended without a word", "stopped"]
    assert [row["restarts"] for row in rows] == [0, 0, 1]
    expected = {"step": 10, "of": 40, "loss": 3.25, "validation": 4.5, "tokens/s": None, "checkpoint": 5}
    assert all(row | expected == row for row in rows)
    assert len(table.splitlines()) == 4
    assert "3.2500" in table.splitlines()[1]


def test_what_is_no_run_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        shown(monkeypatch, capsys, tmp_path / "nothing")
    assert "nothing: no run there" in capsys.readouterr().err
