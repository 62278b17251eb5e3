import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.status import main
from mone_common.run_folder import find_runs, lock_run_folder
from mone_common.run_records import read_metrics

Call = Callable[..., tuple[int, str, str]]


def made(run: Path, state: str, **more: object) -> Path:
    run.mkdir()
    (run / "config.yaml").write_text("training: {steps: 40}\n")
    (run / "status.json").write_text(json.dumps({"state": state, "time": 1.0, **more}))
    records = [{"step": 5, "time": 1.0, "validation/loss": 4.5}, {"step": 10, "time": 2.0, "train/loss": 3.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 1')
    (run / "checkpoints/step-00000005").mkdir(parents=True)
    return run


def test_one_line_per_run(tmp_path: Path, call_main: Call) -> None:
    alive, killed = made(tmp_path / "alive", "running"), made(tmp_path / "killed", "running")
    stopped = made(tmp_path / "stopped", "stopped", reason="SIGNAL")
    attempts = [{"job": "7", "restart": n, "time": 1.0, "outcome": "failed", "step": 3, "reason": "", "requeued": n == 0}
                for n in (0, 1)]  # fmt: skip
    (stopped / "launch").mkdir()
    (stopped / "launch/attempts.jsonl").write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    with lock_run_folder(alive):
        _, out, _ = call_main(main, "--json", str(alive), str(killed), str(stopped))
        _, table, _ = call_main(main, str(alive), str(killed), str(stopped))
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["state"] for row in rows] == ["running", "crashed", "stopped"]
    assert [row["restarts"] for row in rows] == [0, 0, 1]
    expected = {"step": 10, "of": 40, "loss": 3.25, "validation": 4.5, "tokens/s": None, "checkpoint": 5}
    assert all(row | expected == row for row in rows)
    assert len(table.splitlines()) == 4
    assert "3.2500" in table.splitlines()[1]


def test_a_sweep_folder_selects_its_points(tmp_path: Path, call_main: Call) -> None:
    (tmp_path / "sweep").mkdir()
    for seed, state in ((1, "complete"), (2, "failed")):
        made(tmp_path / f"sweep/seed={seed}", state)
    _, out, _ = call_main(main, "--json", str(tmp_path))
    assert [json.loads(line)["run"] for line in out.splitlines()] == [f"{tmp_path}/sweep/seed={seed}" for seed in (1, 2)]


def test_a_folder_without_a_run_is_reported(tmp_path: Path, call_main: Call) -> None:
    code, _, error = call_main(main, str(tmp_path / "nothing"))
    assert code == 2
    assert "nothing: no run there" in error
    (tmp_path / "refused").mkdir()
    assert call_main(main, str(tmp_path / "refused"))[0] == 2
    # Beside other runs it is not reported.
    assert call_main(main, str(tmp_path / "refused"), str(made(tmp_path / "run", "complete")))[0] == 0


RECORDS = b'{"step": 5, "train/loss": 4.5}\n'
DAMAGE = {
    "of a directory": lambda path: path.mkdir(),
    "of a pipe": os.mkfifo,
    "of a link to itself": lambda path: path.symlink_to(path.name),
    "of a link to nothing": lambda path: path.symlink_to("nowhere"),
    "of a device": lambda path: path.symlink_to("/dev/zero"),
    "of zeros": lambda path: path.write_bytes(b"\0" * 64 + b"\n"),
    "of Latin letters": lambda path: path.write_bytes(b'{"state": "\xe9"}\n'),
    "of a half": lambda path: path.write_bytes(b'{"state": "compl\n'),
    "of a list": lambda path: path.write_bytes(b"[1, 2]\n"),
    "of a number": lambda path: path.write_bytes(b"5\n"),
    "of depth": lambda path: path.write_bytes(b"[" * 10_000 + b"\n"),
}


def status_of(call_main: Call, folder: Path) -> tuple[dict[str, Any], str]:
    """The status of the run `damaged` beside a valid run, as JSON and as text."""
    code, out, error = call_main(main, "--json", str(folder))
    rows = {Path(row["run"]).name: row for row in map(json.loads, out.splitlines())}
    assert code == 0
    assert (rows["good"]["state"], rows["good"]["step"], rows["good"]["problems"]) == ("complete", 10, [])
    code, table, error = call_main(main, str(folder))
    assert (code, len(table.splitlines())) == (0, 1 + len(rows))
    return rows["damaged"], error


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "status.json", "launch/attempts.jsonl"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_reported_and_the_rest_is_shown(
    tmp_path: Path, call_main: Call, name: str, damage: Callable[[Path], object]
) -> None:
    made(tmp_path / "good", "complete")
    path = made(tmp_path / "damaged", "complete") / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    damage(path)
    row, error = status_of(call_main, tmp_path)
    (problem,) = row["problems"]
    assert problem.startswith(f"{path}: ")
    assert error.splitlines() == [problem]
    expected: dict[str, Any] = {"state": "complete", "step": 10, "of": 40, "checkpoint": 5}
    lost: dict[str, dict[str, Any]] = {
        "config.yaml": {"of": None},
        "metrics.jsonl": {"step": 0},
        "status.json": {"state": "damaged"},
    }
    assert row | expected | lost.get(name, {}) == row


@pytest.mark.parametrize(
    "status",
    ['{"state": 5}', '{"time": 1}', '{"state": "complete", "time": "x"}', '{"state": "complete", "time": NaN}', "null", ""],
)
def test_a_status_of_other_types_is_damaged(tmp_path: Path, call_main: Call, status: str) -> None:
    made(tmp_path / "good", "complete")
    (made(tmp_path / "damaged", "complete") / "status.json").write_text(status)
    row, error = status_of(call_main, tmp_path)
    assert (row["state"], row["step"]) == ("damaged", 10)
    assert "damaged/status.json: " in error


def test_a_damaged_record_does_not_affect_others(tmp_path: Path, call_main: Call) -> None:
    made(tmp_path / "good", "complete")
    lines = [RECORDS, b'{"step": 6\n', b"\xff\n", b'{"train/loss": 1}\n', b'{"step": "7"}\n', b'{"step": 1e999}\n']
    lines += [b'{"step": 8, "train/loss": NaN, "validation/loss": "x", "time": [], "speed/tokens_per_second": true}\n']
    lines += [b'{"step": 9, "validation/loss": 4.25}\n', b'{"step": 10, "tra']
    (made(tmp_path / "damaged", "complete") / "metrics.jsonl").write_bytes(b"".join(lines))
    row, error = status_of(call_main, tmp_path)
    assert (row["step"], row["loss"], row["validation"], row["tokens/s"]) == (9, None, 4.25, None)
    assert error == f"{tmp_path}/damaged/metrics.jsonl: 5 lines are damaged and skipped, first line 2\n"
    assert [record["step"] for record in read_metrics(tmp_path / "damaged")] == [5, 8, 9]


def test_foreign_folders_are_not_checkpoints(tmp_path: Path, call_main: Call) -> None:
    made(tmp_path / "good", "complete")
    run = made(tmp_path / "damaged", "complete")
    for name in ("step-best", "step-00000200.bak", "step-", "step-00000007x"):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints/step-00000008").symlink_to("step-00000008")
    (run / "checkpoints/step-00000009").touch()
    assert status_of(call_main, tmp_path)[0]["checkpoint"] == 5
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert status_of(call_main, tmp_path)[0]["checkpoint"] == 5
    (run / "checkpoints").unlink()
    (run / "checkpoints").symlink_to("checkpoints")
    row, error = status_of(call_main, tmp_path)
    assert row["checkpoint"] is None
    assert "damaged/checkpoints: cannot be read" in error


def test_a_run_without_configuration_is_reported(tmp_path: Path, call_main: Call) -> None:
    made(tmp_path / "good", "complete")
    (made(tmp_path / "damaged", "stopped") / "config.yaml").unlink()
    row, error = status_of(call_main, tmp_path)
    assert (row["state"], row["step"], row["of"]) == ("stopped", 10, None)
    assert error == f"{tmp_path}/damaged: no config.yaml\n"


def test_each_run_is_found_once_despite_links(tmp_path: Path) -> None:
    made(tmp_path / "run", "complete")
    deep = tmp_path / "a/b"
    deep.mkdir(parents=True)
    made(deep / "run", "complete")
    for number in range(12):
        (tmp_path / f"up{number}").symlink_to(".")
        (deep / f"up{number}").symlink_to("..")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("first")
    (tmp_path / "launch").mkdir()  # of a checkout
    assert find_runs([tmp_path, tmp_path / "a"]) == [tmp_path / "a/b/run", tmp_path / "run"]


def test_an_unreadable_folder_is_reported(tmp_path: Path, call_main: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "good", "complete")
    (tmp_path / "damaged").mkdir()

    def refuse(call: Callable[[Any], Any]) -> Callable[[Any], Any]:  # root can read everything
        def instead(path: Any) -> Any:
            if Path(path).name == "damaged":
                raise PermissionError(13, "Permission denied")
            return call(path)

        return instead

    monkeypatch.setattr(os, "listdir", refuse(os.listdir))
    monkeypatch.setattr(os, "scandir", refuse(os.scandir))
    row, error = status_of(call_main, tmp_path)
    assert row["problems"] == [f"{tmp_path}/damaged: cannot be read (Permission denied)"]


def test_control_characters_in_names_are_escaped(tmp_path: Path, call_main: Call) -> None:
    made(tmp_path / "good", "complete")
    made(tmp_path / "a\x1b[31m\nb", "complete")
    made(Path(os.fsdecode(os.fsencode(tmp_path) + b"/c\xff")), "complete")
    code, table, _ = call_main(main, str(tmp_path))
    assert code == 0
    assert len(table.encode().splitlines()) == 4
    assert "a\\x1b[31m\\nb" in table
