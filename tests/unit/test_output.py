"""Training does not depend on its output; other commands end when their reader ends."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from mone_common.console import reporting_errors
from tests.conftest import ROOT

TRAINING = """
import logging, os, sys
from mone_common.output import unblock_output
logging.basicConfig()
unblock_output()
for number in range(3000):
    print(f"step {number} " + 100 * "\N{GREEK SMALL LETTER ALPHA}", flush=True)
    print("a word", end=" ", file=sys.stderr)
    logging.warning("a warning")
sys.stdout.write("no end of line")
if os.fork() == 0:
    print("of a fork", flush=True)
    os._exit(0)
os.wait()
open(sys.argv[1], "w").write("complete")
"""


def train(tmp_path: Path, **how: Any) -> None:
    """A run completes with exit code 0 even if its output cannot be written."""
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path / "done")],
        cwd=ROOT,
        timeout=60,
        **{"stderr": subprocess.DEVNULL} | how,
    )
    assert done.returncode == 0
    assert (tmp_path / "done").read_text() == "complete"


def pipe(*, read: bool, blocking: bool = True) -> tuple[IO[bytes] | None, IO[bytes]]:
    """A pipe whose reader has ended, or does not read."""
    reading, writing = os.pipe()
    os.set_blocking(writing, blocking)
    if not read:
        os.close(reading)
    return os.fdopen(reading, "rb") if read else None, os.fdopen(writing, "wb")


@pytest.mark.parametrize(("read", "blocking"), [(False, True), (True, True), (True, False)])
def test_a_pipe_that_is_closed_or_full_stops_nothing(tmp_path: Path, read: bool, blocking: bool) -> None:
    reader, writer = pipe(read=read, blocking=blocking)
    with writer:
        train(tmp_path, stdout=writer, stderr=writer)
    if reader is not None:
        with reader:
            assert reader.read().startswith(b"step 0 ")


def test_a_full_disk_or_a_closed_descriptor_stops_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        train(tmp_path, stdout=full, stderr=full)
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "closed")]
    assert subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *command], cwd=ROOT, timeout=60).returncode == 0
    # The next opened file must not get the descriptor of the standard output.
    assert (tmp_path / "closed").read_text() == "complete"


def test_output_is_written_in_order_in_any_encoding(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        train(tmp_path, stdout=log, stderr=log, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    text = (tmp_path / "log").read_text()
    assert re.findall(r"step (\d+) \\u03b1", text) == [str(number) for number in range(3000)]
    assert text.count("a word") >= 3000
    assert "of a fork" in text
    assert text.count("no end of line") == 2  # once from the fork


def test_dropped_text_is_counted(tmp_path: Path) -> None:
    script = """
import os, sys, time
from mone_common.output import unblock_output, drain_output
unblock_output()
print("x" * 999_999, flush=True)
time.sleep(0.2)
for number in range(20_000):
    print("step", flush=True)
print("ready", file=sys.stderr, flush=True)
sys.stdin.readline()
drain_output(10)
print("after", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.close()
        lines = process.stdout.read().splitlines()
    assert 10_000 <= lines.count("step") < 20_000
    lost = (20_000 - lines.count("step")) * len("step\n")
    assert f"[{lost} bytes of output are missing here: not read]" in lines
    assert lines[-1] == "after"


COMMAND = """
import sys
from mone_common.console import UserError, reporting_errors

@reporting_errors
def main():
    for number in range(100_000):
        print("line", number)
    sys.exit(0)

main()
"""


def test_a_command_ends_quietly_with_its_reader() -> None:
    script = '"$@" | head -1; echo ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "-c", COMMAND], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("line 0\n141\n", "")


def test_an_error_of_any_rank_is_printed() -> None:
    script = """
from mone_common.console import UserError, reporting_errors

@reporting_errors
def main():
    raise UserError("corpus.path=x: not there")

main()
"""
    for rank in ("1", ""):
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "RANK": rank}, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (2, "error: corpus.path=x: not there\n")


@pytest.mark.parametrize("shown", [True, False])
def test_what_modules_log_is_shown_by_commands_alone(capsys: pytest.CaptureFixture[str], shown: bool) -> None:
    def log() -> None:
        logging.getLogger("mone_model.module").warning("%d%% is odd", 5)
        logging.getLogger("data_prep.module").info("a note")
        logging.getLogger("elsewhere").info("of another package")

    (reporting_errors(reporting_errors(log)) if shown else log)()
    assert capsys.readouterr().err == ("warning: 5% is odd\na note\n" if shown else "")
    assert logging.getLogger("mone_model").handlers == []
