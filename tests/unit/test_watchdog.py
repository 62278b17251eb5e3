"""The watchdog ends a run that hangs, and only such a run, even if the clock changes."""

import os
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from tests.conftest import ROOT
from train import watchdog as module
from train.meeting import FAILED
from train.watchdog import Watchdog

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
    assert "in <module>" in done.stderr  # from the stack


def test_a_rank_that_waits_for_a_failed_rank_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes, ended = list[int](), threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        watchdog.close()
        ended.set()

    monkeypatch.setattr(module, "ORPHANED_SECONDS", 0.5)
    monkeypatch.setattr(os, "_exit", leave)
    store = dist.HashStore()
    watchdog = Watchdog(store, rank=0, world_size=2, timeout=4, note=print)
    watchdog.enter(3, "saving")
    assert not ended.wait(1)
    store.add(FAILED, 1)
    assert ended.wait(10)
    assert codes == [1]
    assert "rank 0 ends in saving of step 3: another rank has failed" in capsys.readouterr().err
