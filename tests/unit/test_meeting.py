"""All processes of a job continue, or all end. In these tests a process is a thread with its own connection."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

from mone_common.console import ReportedError, UserError, showing_log
from train import meeting as module
from train.checkpoint import SaveFailed
from train.meeting import Meeting


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(get_free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(module, "SHARED_SECONDS", 0.3)


def play(act: Callable[[Meeting], Any], hosts: str, world_size: int | None = None) -> list[Any]:
    """Run `act` as one rank on each of these hosts; returns "went on" or the exit code of each."""
    outcomes: list[Any] = ["hangs"] * len(hosts)
    # Keep all meetings: the store ends with that of rank 0.
    meetings = [Meeting(rank, world_size or len(hosts)) for rank in range(len(hosts))]

    def run(rank: int) -> None:
        meeting = meetings[rank]
        meeting.host = meeting.first_host = hosts[rank]
        try:
            act(meeting)
            outcomes[rank] = "went on"
        except SystemExit as exit:
            outcomes[rank] = exit.code

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return outcomes


def checking(wrong: dict[int, str]) -> Callable[[Meeting], None]:
    """A check that passes, then one that fails on some ranks."""

    def act(meeting: Meeting) -> None:
        with meeting.together("nothing"):
            pass
        with meeting.together("checks"):
            if meeting.rank in wrong:
                raise UserError(wrong[meeting.rank])

    return act


@pytest.mark.parametrize(
    ("wrong", "lines"),
    [
        ({}, []),
        # One line if all ranks fail; otherwise each reason with its ranks, on the first machine and on that of the failure.
        (dict.fromkeys(range(4), "no data"), ["no data", "no data"]),
        ({3: "no data"}, ["rank 3 on b: no data"] * 2),
        ({2: "no data", 3: "no data"}, ["ranks 2, 3 on b: no data"] * 2),
        ({1: "no data"}, ["rank 1 on a: no data"]),
        ({0: "locked"}, ["rank 0 on a: locked"]),
        ({0: "locked", 3: "no data"}, ["rank 0 on a: locked", "rank 3 on b: no data", "rank 3 on b: no data"]),
    ],
)
def test_a_failed_check_ends_all_ranks_with_rank_host_and_reason(
    capsys: pytest.CaptureFixture[str], wrong: dict[int, str], lines: list[str]
) -> None:
    assert play(checking(wrong), "aabb") == (["went on"] * 4 if not wrong else [2] * 4)
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(f"error: {line}" for line in lines)


def test_a_missing_rank_ends_the_others(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranks 2 and 3 are missing; the failure of rank 1 is printed nevertheless.
    monkeypatch.setattr(module, "MEETING_SECONDS", 2.0)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 1.0)

    def act(meeting: Meeting) -> None:
        with meeting.together("checks"):
            if meeting.rank == 1:
                raise UserError("no data")

    assert play(act, "ab", world_size=4) == [2, 2]
    assert "error: rank 1 on b: no data" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_PORT", str(get_free_port()))
    with showing_log():
        assert play(checking({}), "ab", world_size=4) == [1, 1]
    printed = capsys.readouterr().err
    assert printed.startswith("waiting for ranks 2, 3 of 4 processes\n")
    assert "error: rank 0 on a: ranks 2, 3 did not connect within 2 s" in printed


def test_a_failure_is_reported_if_rank_0_is_unreachable(capsys: pytest.CaptureFixture[str]) -> None:
    meeting = Meeting(1, 2)
    with pytest.raises(SystemExit) as exit, meeting.together("checks"):
        raise UserError("no data")
    assert exit.value.code == 2
    assert f"error: rank 1 on {meeting.host}: no data\n" in capsys.readouterr().err


def test_a_single_process_raises_its_own_exception() -> None:
    with pytest.raises(UserError, match="no data"), Meeting(0, 1).together("checks"):
        raise UserError("no data")


def test_a_folder_that_is_not_shared_is_reported_with_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(shared: bool) -> Callable[[Meeting], None]:
        def check(meeting: Meeting) -> None:
            folder = tmp_path / ("runs" if shared else f"runs-of-{meeting.host}")
            folder.mkdir(exist_ok=True)
            meeting.check_shared({"run.dir": folder, "data.index_cache": folder / "index_cache"})

        return check

    assert play(act(shared=True), "ab") == ["went on"] * 2
    assert [path.name for path in (tmp_path / "runs").rglob("*")] == ["index_cache"]
    monkeypatch.setenv("MASTER_PORT", str(get_free_port()))
    assert play(act(shared=False), "ab") == [2, 2]
    told = f"error: rank 1 on b: run.dir={tmp_path}/runs-of-b: a file that rank 0 on a wrote there is not visible here"
    assert told in capsys.readouterr().err


def test_one_rank_prints_a_common_reason(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, bool] = {}

    def act(wrong: dict[int, str], kind: type[ReportedError] = UserError) -> Callable[[Meeting], None]:
        def end(meeting: Meeting) -> None:
            with meeting.together("start"):
                pass
            if meeting.rank in wrong:
                told[meeting.rank] = meeting.report(kind(wrong[meeting.rank]))

        return end

    play(act(dict.fromkeys(range(3), "diverged")), "aab")
    assert told == {0: True, 1: False, 2: False}
    assert capsys.readouterr().err == "error: diverged\n" * 2
    told.clear()
    monkeypatch.setenv("MASTER_PORT", str(get_free_port()))
    play(act({2: "out of memory"}), "aab")
    assert told == {2: True}
    assert capsys.readouterr().err == "error: rank 2 on b: out of memory\n"
    # All ranks raise it, each with its own number of free bytes.
    monkeypatch.setenv("MASTER_PORT", str(get_free_port()))
    play(act({rank: f"{rank} GiB are free" for rank in range(3)}, SaveFailed), "aab")
    assert told == {0: True, 1: False, 2: False}
    assert capsys.readouterr().err == "error: 0 GiB are free\n"
