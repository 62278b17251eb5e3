"""Stop a run on request: after each step all ranks agree by a collective whether to stop; the loop then saves and ends."""

import atexit
import enum
import os
import signal
import time
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from train.launcher import launcher_has_gone

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that request a stop. SIGHUP, from a closed terminal, is added unless it is ignored, as under nohup."""


class StopReason(enum.IntEnum):
    """Why a run stops before its last step. If there are several reasons, the highest applies."""

    NONE = 0
    STEP = 1
    """run.stop_at_step was reached."""
    TIME = 2
    """run.time_limit is near."""
    SIGNAL = 3
    """SIGTERM, SIGINT (Ctrl-C), SIGUSR1, or SIGHUP unless it is ignored."""
    LAUNCHER = 4
    """torchrun was killed, so that no launcher would end this rank if another rank failed."""
    DATA = 5
    """A shard changed while it was read: the steps since the last check must not be saved."""


class StopRequest:
    """Collects reasons to stop; time_limit: in seconds since the start of this process."""

    def __init__(self, time_limit: float) -> None:
        self.noted = StopReason.NONE
        # Compare both wall-clock times now, since the wall clock may be set later.
        age = max(0.0, time.time() - psutil.Process(os.getpid()).create_time())
        self.deadline = time.monotonic() - age + time_limit
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)
        # A job script sends the signal repeatedly. Python removes its handlers at exit; the signal would then kill it.
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.note(StopReason.SIGNAL)

    def note(self, reason: StopReason) -> None:
        """Set a reason of this rank."""
        self.noted = max(self.noted, reason)

    def agreed(self, device: torch.device, *, reserve_seconds: float) -> StopReason:
        """The highest reason of all ranks; a collective on every rank, so that all stop after the same step.

        reserve_seconds: time that one more step and a checkpoint may take.
        """
        if time.monotonic() + reserve_seconds > self.deadline:
            self.note(StopReason.TIME)
        if launcher_has_gone():
            self.note(StopReason.LAUNCHER)
        highest = torch.tensor(int(self.noted), device=device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return StopReason(int(highest.item()))
