"""Child processes end with their parent, even if it ends first."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

LATE = """
import os, time
from mone_common.processes import end_with_parent
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    print("without a parent", flush=True)
    end_with_parent(parent)
    print("left behind", flush=True)
"""
IN_TIME = """
import os, signal, time
from mone_common.processes import forks_end_with_this_process
forks_end_with_this_process()
ready, write = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        print("forked by a fork", flush=True)
        os.write(write, b".")
    time.sleep(10)
    print("left behind", flush=True)
    os._exit(0)
os.read(ready, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""

AT_EXIT = """
import multiprocessing, time
from mone_common.processes import kill_daemons_at_exit, outlive_signals
def work(ready):
    outlive_signals()
    ready.set()
    time.sleep(60)
    print("left behind", flush=True)
kill_daemons_at_exit()
forks = multiprocessing.get_context("fork")
ready = forks.Event()
forks.Process(target=work, args=[ready], daemon=True).start()
ready.wait()
print("ends", flush=True)
"""

HELPERS = """
import multiprocessing, os, signal, time
from multiprocessing.managers import SyncManager
from multiprocessing.util import get_temp_dir
from mone_common.processes import outlive_signals

def read():
    outlive_signals()
    get_temp_dir()
    ready.put(1)
    for number in signal.SIGHUP, signal.SIGUSR2:
        os.kill(os.getpid(), number)  # as from a terminal or another process
    while True:
        ready.put(bytes(100_000))  # not read

manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
if __name__ == "__main__":
    manager.start(initializer=outlive_signals)
    ready = multiprocessing.Queue()
    multiprocessing.get_context("fork").Process(target=read).start()
    ready.get()
    manager.list([1])
    time.sleep(0.2)
    print(*sorted(name[:5] for name in os.listdir(os.environ["TMPDIR"])), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux alone")
def test_children_of_a_killed_process_leave_no_temporary_folders(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text(HELPERS)
    # The path of a socket has at most 107 characters: tmp_path may be too long.
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        # Returns when every process that holds the pipe has ended.
        done = subprocess.run(
            [sys.executable, str(tmp_path / "helpers.py")], env=environment, capture_output=True, text=True, timeout=60
        )
        assert (done.stdout, done.stderr) == ("pymp- pymp-\n", "")
        assert os.listdir(folder) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux alone")
@pytest.mark.parametrize(
    ("script", "printed"), [(LATE, "without a parent\n"), (IN_TIME, "forked by a fork\n"), (AT_EXIT, "ends\n")]
)
def test_no_process_is_left_behind(script: str, printed: str) -> None:
    # Returns when every process that holds the pipe has ended.
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (printed, "")
