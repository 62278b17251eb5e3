"""Start train.pretrain with injected faults: `python -m tests.faults.victim OPTIONS`, with or without torchrun.

The environment variable MONE_FAULTS holds a JSON list of faults, each a function of this module with its arguments:
[{"fault": "poison_loss", "rank": 1, "steps": [3], "factor": "nan"}].
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
FOREVER = 10**6

step_now = 0


def before_steps(act: Callable[[int], object]) -> None:
    """Call `act` with the number of each step before the step begins."""
    from train.loop import Trainer

    inner = Trainer.train_step

    def train_step(self: Any, batches: Any) -> None:
        global step_now
        step_now = self.step
        act(self.step)
        inner(self, batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def on_rank(rank: int, step: int, act: Callable[[], object]) -> None:
    """Do something on one rank before a step."""
    before_steps(lambda number: act() if (RANK, number) == (rank, step) else None)


def poison_loss(rank: int, steps: list[int], factor: str) -> None:
    """Multiply the training loss, and thereby its gradient, on one rank in these steps; no steps: in all."""
    import torch

    import train.engines.megatron as engine

    inner = engine.sums_of_losses
    before_steps(lambda number: None)

    def sums_of_losses(mask_BS: torch.Tensor, losses_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        poisoned = rank == RANK and torch.is_grad_enabled() and (not steps or step_now in steps)
        return inner(mask_BS, losses_BS * float(factor) if poisoned else losses_BS)

    engine.sums_of_losses = sums_of_losses


def poison_gradient(rank: int, steps: list[int]) -> None:
    """Make one number of the gradient infinite on one rank in these steps; the loss does not change."""
    import train.engines.megatron as engine

    inner = engine.finalize_model_grads
    before_steps(lambda number: None)

    def finalize_model_grads(model: list[Any], *args: Any, **kwargs: Any) -> None:
        if rank == RANK and step_now in steps:
            next(model[0].parameters()).main_grad.view(-1)[0] = float("inf")
        inner(model, *args, **kwargs)

    engine.finalize_model_grads = finalize_model_grads


def sleep_reading(rank: int, step: int) -> None:
    """Hang in reading data on one rank."""
    from train.data import Blend

    inner = Blend.__getitem__
    before_steps(lambda number: None)

    def getitem(self: Blend, index: int) -> Any:
        if (RANK, step_now) == (rank, step):
            time.sleep(FOREVER)
        return inner(self, index)

    Blend.__getitem__ = getitem  # type: ignore[method-assign]


def slow(seconds: float) -> None:
    """Add a delay to each step."""
    before_steps(lambda number: time.sleep(seconds))


def lose_patience(step: int, seconds: float) -> None:
    """Let the watchdog wait so long only from a step on: the phases before it may be longer."""
    from train.loop import Trainer

    inner = Trainer.train_step

    def train_step(self: Any, batches: Any) -> None:
        if self.step >= step:
            self.watchdog.timeout = seconds
        inner(self, batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]


def fill_disk(path: str, step: int, until: int, leave: int) -> None:
    """Before a step, fill the disk of a folder except for some bytes; free the space before another step."""
    filler = Path(path) / "filler"

    def fill() -> None:
        free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
        filler.write_bytes(bytes(max(0, free - leave)))

    on_rank(0, step, fill)
    on_rank(0, until, lambda: filler.unlink())


def overstate_free_space() -> None:
    """Report free space in all checks, as if the disk filled up afterwards."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=2**50)


def obstruct(names: dict[str, int]) -> None:
    """Put a folder at the path of a file of a step's checkpoint, so that the file cannot be written."""
    from train.checkpoint import Saver

    inner = Saver._make_room

    def make_room(self: Saver, unfinished: Path, needed: int) -> None:
        inner(self, unfinished, needed)
        for name, step in names.items():
            if step == step_now:
                (unfinished / name).mkdir()

    before_steps(lambda number: None)
    Saver._make_room = make_room  # type: ignore[method-assign]


def become_read_only(path: str, step: int) -> None:
    """Mount a folder read-only before a step; open files stay open."""

    def lay() -> None:
        subprocess.run(["mount", "--bind", path, path], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True)

    on_rank(0, step, lay)


def alter(path: str, step: int, rank: int) -> None:
    """Overwrite a file with other content of the same size before a step."""

    def write() -> None:
        content = Path(path).read_bytes()
        other = Path(path).with_name("other")
        other.write_bytes(content[len(content) // 2 :] + content[: len(content) // 2])
        other.replace(path)

    on_rank(rank, step, write)


if __name__ == "__main__":
    for fault in json.loads(os.environ["MONE_FAULTS"]):
        globals()[fault.pop("fault")](**fault)

    from train.pretrain import main

    main()
