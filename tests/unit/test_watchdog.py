"""A run that hangs is ended, whatever the clock of the machine does, and one that does not is left alone."""

import subprocess
import sys

from tests.conftest import ROOT

SCRIPT = """
import os, signal, time
import torch.distributed as dist
from train.watchdog import Watchdog

now, jumped = time.time, False
time.time = lambda: now() + (7200 if jumped else 0)
note = lambda reason: print("noted:", reason, flush=True)
watchdog = Watchdog(dist.HashStore(), rank=0, world_size=1, timeout=1, note=note)
for step in range(10):
    watchdog.enter(step, "training")
    jumped = step >= 5
    time.sleep(0.1)
if os.fork() == 0:
    time.sleep(1.5)
    os.kill(os.getppid(), signal.SIGCONT)
    os._exit(0)
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(0.5)
print("still there", flush=True)
time.sleep(60)
"""


def test_a_run_that_hangs_ends_with_code_4_and_neither_a_clock_that_jumps_nor_a_stopped_process_counts() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 4, done.stderr
    assert done.stdout.startswith("still there\nnoted: no progress for 1 s (run.timeout_minutes): ")
    assert "step 9, training, for " in done.stderr
    assert "in <module>" in done.stderr  # the stack says where
