"""Processes end with the one that started them, also if that was faster."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT

LATE = """
import os, time
from data_prep.lifetime import end_with_parent
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
from data_prep.lifetime import forks_end_with_this_process
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


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel does it on Linux alone")
@pytest.mark.parametrize(("script", "printed"), [(LATE, "without a parent\n"), (IN_TIME, "forked by a fork\n")])
def test_no_process_is_left_behind(script: str, printed: str) -> None:
    # Returns when every process that holds the pipe has ended.
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (printed, "")
