"""Save checkpoints in Megatron-Core's sharded format, collectively on all ranks; see docs/checkpoints.md.

    saver = Saver(folder, config.checkpoint)
    saver.save(step=200, state=engine.sharded_state(), facts=CheckpointFacts(...))
    saver.finish(wait=False)                     # between steps, while a checkpoint is written in the background

`mone_common.checkpoint_folder` defines the files on disk. `train.checkpoint_integrity` chooses the checkpoint to continue
from.
"""

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from mone_common.checkpoint_folder import MANIFEST as MANIFEST
from mone_common.checkpoint_folder import digest, free_name, name_of, prune, publish, remove_leftovers
from mone_common.console import ReportedError
from mone_common.files import writing
from mone_common.processes import forks_end_with_this_process
from mone_common.text import excerpt
from mone_model.megatron import versions
from mone_model.megatron.cpu_support import current_device
from train.checkpoint_facts import CheckpointFacts
from train.checkpoint_private import noted_errors, open_results_queue
from train.config_sections import CheckpointConfig
from train.random_state import random_state


class SaveFailed(ReportedError):
    """A checkpoint could not be written. It has no final name; earlier checkpoints are intact."""

    of_all_ranks = True


class NotFinite(SaveFailed):
    """Weights or optimizer state are not finite. They are not saved, since later steps cannot repair them."""

    exit_code = 3


@dataclass(frozen=True)
class Saved:
    """A published checkpoint and the cost of its save."""

    path: Path
    stall_seconds: float
    """Time for which training was blocked."""
    write_seconds: float
    """Time from the start of the save until the checkpoint was published."""
    step: int
    notes: list[str]
    """Messages for the user: folders that were renamed or cannot be deleted."""


class Saver:
    """Writes the checkpoints of a run, in the background if `async_save` is set. Public methods are collectives."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.queue = AsyncCallsQueue(persistent=False)  # a persistent writer hangs on CPUs
        self.pending: _Pending | None = None
        self.resumed_from: int | None = None
        self.skipped_steps: Set[int] = frozenset()
        self.reported: set[str] = set()
        # After a kill -9 of their training process, writers would wait for one another forever.
        forks_end_with_this_process()
        noted_errors()

    def resumed(self, step: int, *, skipped_steps: Set[int]) -> None:
        """Set the checkpoint resumed from, which is never deleted, and the skipped ones, which keep_last ignores."""
        self.resumed_from, self.skipped_steps = step, skipped_steps

    def save(self, *, step: int, state: dict[str, Any], facts: CheckpointFacts) -> None:
        """Start to write a checkpoint; without async_save, wait until it is written.

        state: from `engine.sharded_state()`. The previous save must be finished. Raises SaveFailed or NotFinite on every
        rank.
        """
        assert self.pending is None
        began = time.monotonic()
        if found := find_not_finite(state):
            raise NotFinite(
                f"step {step}: {found} is not finite, and not saved. Earlier checkpoints are intact; try a lower "
                "optimizer.lr, a longer optimizer.warmup_steps or a smaller optimizer.clip_grad"
            )
        state = state | {"random": random_state()}
        notes, unfinished = _agree(functools.partial(self._clear, step), "prepare", self.folder)
        _agree(functools.partial(self._make_room, unfinished, _bytes_of_all_ranks(state)), "prepare", self.folder)
        _agree_all(open_results_queue, "prepare", self.folder)
        request = dist_checkpointing.save(state, str(unfinished), async_sharded_save=True, **versions.save_options())
        _agree(_raise_noted, "begin", unfinished)
        if request.async_fn is not None:
            # The writer process computes the digests, so that training does not wait.
            request = request._replace(async_fn=functools.partial(_write_and_digest, request.async_fn, unfinished))
        self.pending = _Pending(unfinished, step, facts, began, notes)
        try:
            if self.config.async_save:
                self.queue.schedule_async_request(request)
            else:
                request.execute_sync()
        except (CheckpointException, CheckpointingException, OSError) as error:
            self._give_up(error)
        self.pending.stall += time.monotonic() - began
        if not self.config.async_save:
            self.pending.written = True

    def finish(self, *, wait: bool) -> Saved | None:
        """Publish the checkpoint if it is written, and delete old ones.

        Returns None if there is nothing to publish, or if, without wait, writing is not complete. Raises SaveFailed on every
        rank.
        """
        if self.pending is None:
            return None
        began = time.monotonic()
        if not self.pending.written:
            try:
                self.queue.maybe_finalize_async_calls(blocking=wait)
            except (CheckpointException, CheckpointingException, OSError) as error:
                self._give_up(error)
            if self.queue.get_num_unfinalized_calls():
                return None
        pending, self.pending = self.pending, None
        final, notes = _agree(functools.partial(self._publish, pending), "publish", self.folder / name_of(pending.step))
        self.skipped_steps -= {pending.step}
        now = time.monotonic()
        stall, write = pending.stall + now - began, now - pending.began
        new_notes = [note for note in pending.notes + notes if note not in self.reported]
        self.reported.update(new_notes)
        return Saved(final, stall, write, pending.step, new_notes)

    def _clear(self, step: int) -> tuple[list[str], Path]:
        """Remove leftovers; return notes and the name of the folder to write to."""
        return remove_leftovers(self.folder), free_name(self.folder / f".unfinished-step-{step:08d}")

    def _make_room(self, unfinished: Path, needed: int) -> None:
        unfinished.mkdir(parents=True)
        # Check before writing: if one rank runs out of space during the write, the others may wait for it.
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            unfinished.rmdir()
            raise OSError(f"{free / 2**30:.3f} GiB are free, about {needed / 2**30:.3f} GiB are needed")

    def _publish(self, pending: "_Pending") -> tuple[Path, list[str]]:
        _raise_noted()
        final, notes = publish(pending.unfinished, step=pending.step, noted=pending.facts.to_dict())
        notes += prune(
            self.folder,
            step=pending.step,
            run=pending.facts.run,
            keep_last=self.config.keep_last,
            keep_every=self.config.keep_every,
            spared=() if self.resumed_from is None else (self.resumed_from,),
            uncounted=self.skipped_steps - {pending.step},
        )
        return final, notes

    def _give_up(self, error: BaseException) -> None:
        assert self.pending is not None
        unfinished, self.pending = self.pending.unfinished, None
        reason = reason_of(error) if isinstance(error, CheckpointException) else str(error)
        # torch's writer does not report a full disk as such.
        reason += f"; {shutil.disk_usage(self.folder).free / 2**30:.3f} GiB are free"
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveFailed(f"no checkpoint in {self.folder}: {reason}") from error


def reason_of(error: CheckpointException) -> str:
    """The reason of a torch checkpoint error in one line; its own text has many tracebacks."""
    return "; ".join(f"rank {rank}: {excerpt(failure[0])}" for rank, failure in error.failures.items())


@dataclass
class _Pending:
    unfinished: Path
    step: int
    facts: CheckpointFacts
    began: float
    notes: list[str]
    stall: float = 0.0
    written: bool = False


def gather_problems(mine: str | None) -> list[str]:
    """The problems of all ranks, with rank numbers; a collective on every rank."""
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return [f"rank {rank}: {problem}" for rank, problem in enumerate(gathered) if problem is not None]


def find_not_finite(state: dict[str, Any]) -> str | None:
    """The name of a tensor with non-finite elements in a sharded or loaded state, or None; a collective on every rank."""
    found = next((name for name, tensor in _tensors(state) if not _finite(tensor)), None)
    # Reduce the count first: names are rarely needed.
    count = torch.tensor(int(found is not None), device=current_device())
    dist.all_reduce(count)
    if not count.item():
        return None
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, found)
    return next(name for name in names if name is not None)


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested dicts and lists, with names: the name on disk if sharded, else the path in the tree."""
    if isinstance(tree, ShardedBase):
        if torch.is_tensor(tree.data) and is_main_replica(tree.replica_id):
            yield tree.key, tree.data
    elif torch.is_tensor(tree):
        yield name, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # aminmax propagates NaN and, unlike isfinite, allocates no mask of the tensor's size.
    return all(math.isfinite(bound.item()) for bound in tensor.detach().aminmax())


Result = TypeVar("Result")


def _agree(act: Callable[[], Result], verb: str, path: Path) -> Result:
    """Call `act` on rank 0 and return its result on every rank; SaveFailed on every rank if it raises OSError."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except OSError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise SaveFailed(f"cannot {verb} {path}: {outcome[1]}")
    return outcome[0]


def _agree_all(act: Callable[[], object], verb: str, path: Path) -> None:
    """Call `act` on every rank; SaveFailed on every rank if it raises OSError or EOFError on one."""
    failed = None
    try:
        act()
    except (OSError, EOFError) as error:  # EOFError: the started process ended early
        failed = repr(error)
    if failures := gather_problems(failed):
        raise SaveFailed(f"cannot {verb} {path}: {'; '.join(failures)}")


def _bytes_of_all_ranks(state: dict[str, Any]) -> int:
    """Size of the checkpoint over all ranks; a collective on every rank."""
    mine = sum(
        entry.data.nbytes
        for entry in nested_values(state)
        if isinstance(entry, ShardedBase) and torch.is_tensor(entry.data) and is_main_replica(entry.replica_id)
    )
    total = torch.tensor(mine, dtype=torch.int64, device=current_device())
    dist.all_reduce(total)
    return int(total.item())


def _raise_noted() -> None:
    """OSError if rank 0 could not write one of the small files that only rank 0 writes."""
    errors = noted_errors()
    if errors:
        text = "; ".join(map(str, errors))
        errors.clear()
        raise OSError(text)


def _write_and_digest(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Write this rank's files, then their digests beside them."""
    write(rank, *args, **kwargs)
    # Rank 0 computes missing digests later. An error on one rank only would leave the others waiting.
    with contextlib.suppress(OSError):
        digests = {path.name: digest(path) for path in folder.glob(f"__{rank}_*")}
        with writing(folder / f"digests-{rank}.json") as temporary:
            temporary.write_text(json.dumps(digests))
