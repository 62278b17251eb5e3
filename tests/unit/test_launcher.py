"""Incomplete or inconsistent launcher variables are refused, and leftovers of torchrun are removed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mone_common.console import UserError
from tests.conftest import ROOT
from train import calibrate, pretrain, sample
from train.launcher import ALWAYS, ON_THIS_MACHINE, check_alone, check_launcher, remove_empty_logs

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
LOCAL = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALWAYS, *ON_THIS_MACHINE):
        monkeypatch.delenv(name, raising=False)


def give(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables", [{}, WHOLE, WHOLE | LOCAL, WHOLE | {"LOCAL_RANK": "1"}])
def test_launcher_variables_are_all_set_or_none(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    give(monkeypatch, variables)
    check_launcher()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE='2'", "RANK and MASTER_ADDR and MASTER_PORT missing", "unset WORLD_SIZE"]),
        ({"RANK": "0"}, ["RANK='0'", "WORLD_SIZE and MASTER_ADDR and MASTER_PORT missing", "torchrun"]),
        ({"RANK": ""}, ["RANK=''", "unset RANK"]),
        ({"MASTER_ADDR": "localhost"}, ["RANK and WORLD_SIZE and MASTER_PORT missing"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK='0'", "unset LOCAL_RANK"]),
        (WHOLE | {"MASTER_PORT": ""}, ["MASTER_PORT missing"]),
        (WHOLE | {"RANK": "one"}, ["RANK is not a number"]),
        (WHOLE | {"RANK": "-1"}, ["RANK is not a number"]),
        (WHOLE | {"RANK": "1.0"}, ["RANK is not a number"]),
        (WHOLE | {"LOCAL_RANK": ""}, ["LOCAL_RANK is not a number"]),
        (WHOLE | {"RANK": "4"}, ["RANK must be below WORLD_SIZE"]),
        (WHOLE | {"WORLD_SIZE": "0"}, ["RANK must be below WORLD_SIZE"]),
        (WHOLE | {"MASTER_PORT": "0"}, ["MASTER_PORT must be from 1 to 65535"]),
        (WHOLE | {"MASTER_PORT": "65536"}, ["MASTER_PORT must be from 1 to 65535"]),
        (WHOLE | {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_RANK must be below LOCAL_WORLD_SIZE"]),
        (WHOLE | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, ["at most WORLD_SIZE"]),
    ],
)
def test_inconsistent_launcher_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: list[str]
) -> None:
    give(monkeypatch, variables)
    with pytest.raises(UserError) as error:
        check_launcher()
    for word in words:
        assert word in str(error.value)


def test_a_single_process_command_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_alone("train.sample")
    give(monkeypatch, WHOLE)
    with pytest.raises(UserError, match="WORLD_SIZE=4: train.sample runs in one process"):
        check_alone("train.sample")


@pytest.mark.parametrize("main", [pretrain.main, sample.main, calibrate.main])
def test_commands_check_versions_first(
    main: Callable[[], None], call_main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The run does not exist, and there are no other processes.
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, printed = call_main(main, *([] if main is pretrain.main else ["run=nowhere"]))
    assert code == 2
    assert printed.startswith("error: environment variables WORLD_SIZE='2': RANK and MASTER_ADDR and MASTER_PORT missing")
    assert printed.count("\n") == 1


def test_a_command_line_error_is_printed_once_per_machine(
    call_main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, WHOLE | {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"})
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        code, _, printed = call_main(pretrain.main, "model.hiden_size=64")
        assert (code, printed.count("error: ")) == (2, lines)


def test_empty_log_folders_of_torchrun_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, others, filled = tmp_path / "torchelastic_1", tmp_path / "logs", tmp_path / "torchelastic_2"
    for folder in (ours, others, filled):
        for rank in "01":
            (folder / "none_x/attempt_0" / rank).mkdir(parents=True)
    (filled / "none_x/attempt_0/1/stdout.log").write_text("")
    for folder in (ours, others, filled):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "none_x/attempt_0/0/error.json"))
        remove_empty_logs()
    assert not ours.exists()
    assert (others / "none_x/attempt_0/0").is_dir()
    assert (filled / "none_x/attempt_0/1/stdout.log").exists()


ORPHAN = """
import time
import train.launcher as launcher
launcher.LOOK_SECONDS = 0.05
with launcher.ending_with_launcher():
    print("starts", flush=True)
    time.sleep(60)
print("left behind", flush=True)
"""


def test_a_starting_rank_ends_with_its_launcher() -> None:
    agent = f"""
import os, subprocess, sys, signal
environment = {{**os.environ, "RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "a"}}
rank = subprocess.Popen([sys.executable, "-c", {ORPHAN!r}], env=environment, stdout=subprocess.PIPE)
print(rank.stdout.readline().decode(), end="", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Returns when all processes with the pipe of stderr have ended.
    done = subprocess.run([sys.executable, "-c", agent], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("starts\n", "error: torchrun ended while the run started\n")
