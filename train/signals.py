"""Stop in good order: handlers set a flag, ranks agree by a collective, the loop saves and leaves."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether some rank was asked to stop by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked; a collective on every rank, so that all stop after the same step."""
        asked = torch.tensor(int(self.received is not None), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())
