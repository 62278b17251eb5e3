"""Stop in good order: a rank notes why it should, all agree by a collective after a step, the loop saves and leaves."""

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
"""And SIGHUP, of a terminal that is closed, unless it is ignored, as under nohup."""


class StopReason(enum.IntEnum):
    """Why a run stops before its last step; of several, the highest counts."""

    NONE = 0
    STEP = 1
    """run.stop_at_step was reached."""
    TIME = 2
    """run.time_limit is near."""
    SIGNAL = 3
    """SIGTERM, SIGINT (Ctrl-C), SIGUSR1, or SIGHUP unless it is ignored."""
    LAUNCHER = 4
    """torchrun was killed: nobody would end this rank if another one failed."""
    DATA = 5
    """A shard changed while it was read: the steps since it was last looked at are not to be saved."""


class StopRequest:
    """Whether some rank has a reason to stop; time_limit in seconds, of this process."""

    def __init__(self, time_limit: float) -> None:
        self.noted = StopReason.NONE
        # Both times from the clock of the calendar, at one moment; later it may be set.
        age = max(0.0, time.time() - psutil.Process(os.getpid()).create_time())
        self.deadline = time.monotonic() - age + time_limit
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._on_signal)
        # A job script asks again and again. Python's exit takes its handlers away, and then that would kill who is leaving.
        atexit.register(signal.signal, signal.SIGUSR1, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.note(StopReason.SIGNAL)

    def note(self, reason: StopReason) -> None:
        """This rank has a reason."""
        self.noted = max(self.noted, reason)

    def agreed(self, device: torch.device, *, reserve_seconds: float) -> StopReason:
        """The reason of any rank; a collective on every rank, so that all stop after the same step.

        reserve_seconds: what one more step and a checkpoint may take.
        """
        if time.monotonic() + reserve_seconds > self.deadline:
            self.note(StopReason.TIME)
        if launcher_has_gone():
            self.note(StopReason.LAUNCHER)
        highest = torch.tensor(int(self.noted), device=device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return StopReason(int(highest.item()))
