"""Drop steps whose loss or gradient is not finite, or is a spike.

guard = StepGuard(config.guard, device)
engine.train_step(batches, micro_batches=8, accept=lambda loss, norm: guard.accepts(step, loss, norm))
guard.check_budget(step)                       # Diverged when too many were dropped
"""

import math
import statistics
from collections import deque
from typing import Any

import torch
import torch.distributed as dist

from mone_common.console import ReportedError
from train.config_sections import GuardConfig


class Diverged(ReportedError):
    """Too many steps were dropped. The last checkpoint was written before or between them, with finite weights."""

    exit_code = 3
    of_all_ranks = True


class StepGuard:
    """Decides for each step whether it is dropped, the same on every rank. Checkpoints store `dropped` and `recent`."""

    def __init__(self, config: GuardConfig, device: torch.device, state: dict[str, Any] | None = None) -> None:
        self.config, self.device = config, device
        state = state or {"dropped": [], "recent": []}
        self.dropped: list[int] = list(state["dropped"])
        self.recent = deque((tuple(pair) for pair in state["recent"]), maxlen=config.spike_window)
        self.reason = ""

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, in JSON types."""
        return {"dropped": list(self.dropped), "recent": [list(pair) for pair in self.recent]}

    def accepts(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether this step may change the weights; a collective on every rank. `reason` is set if not."""
        self.reason = self._objection(loss, grad_norm)
        # Loss and norm are results of reductions and should be equal on all ranks. If they are not, this keeps the weights
        # equal.
        refused = torch.tensor(int(bool(self.reason)), device=self.device)
        dist.all_reduce(refused, op=dist.ReduceOp.MAX)
        if refused.item():
            self.dropped.append(step)
            self.reason = self.reason or "another rank refused it"
            return False
        if self.config.spike_sigma is not None:
            self.recent.append((loss, grad_norm))
        return True

    def check_budget(self, step: int, *, since: int = 0) -> None:
        """Raise Diverged if more than max_dropped of the last `window` steps were dropped.

        since: the step of the checkpoint resumed from; 0 for a new run.
        """
        lately = [dropped for dropped in self.dropped if dropped > step - self.config.window]
        if len(lately) > self.config.max_dropped:
            raise Diverged(
                f"steps {', '.join(map(str, lately[-5:]))} were dropped ({self.reason}): more than "
                f"guard.max_dropped={self.config.max_dropped} in {self.config.window} steps. "
                + self._way_out(step, since)
                + "try a lower optimizer.lr, a longer optimizer.warmup_steps or a smaller optimizer.clip_grad"
            )

    def _way_out(self, step: int, since: int) -> str:
        if 0 < since == step - len([dropped for dropped in self.dropped if dropped > since]):
            return (
                f"No step was applied since the checkpoint of step {since}; its weights may be the cause: move it "
                "away to continue from the previous one; also "
            )
        return "The last checkpoint is intact; "

    def check_progress(self, step: int, *, since: int) -> None:
        """Raise Diverged if all of the last `window` steps after step `since` were dropped."""
        first = max(since, step - self.config.window) + 1
        if len([dropped for dropped in self.dropped if dropped >= first]) == step - first + 1:
            raise Diverged(
                f"all of the last {step - first + 1} steps were dropped ({self.reason}): the weights did not change, and "
                "the last step is not saved. Earlier checkpoints are intact; try a lower optimizer.lr"
            )

    def _objection(self, loss: float, grad_norm: float) -> str:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:.4g}, gradient norm {grad_norm:.4g}: not finite"
        sigma = self.config.spike_sigma
        if sigma is not None and len(self.recent) >= self.config.spike_window // 2:
            for name, value, seen in zip(
                ("loss", "gradient norm"), (loss, grad_norm), zip(*self.recent, strict=True), strict=True
            ):
                limit = statistics.fmean(seen) + sigma * statistics.stdev(seen)
                if value > limit:
                    return f"{name} {value:.4g} is above {limit:.4g}: a spike of more than guard.spike_sigma={sigma:g}"
        return ""
