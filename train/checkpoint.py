"""Checkpoints: write, publish, prune, find, load. Megatron-Core's sharded format; docs/checkpoints.md.

    saver = Saver(folder, config.checkpoint)
    saver.save(step=200, state=engine.sharded_state(), facts={...})
    saver.finish(wait=False)                     # between steps, while one is written in the background
    engine.load_state(load_checkpoint(checkpoint, engine.sharded_state(loading=True), same_layout=True))

A checkpoint is written under a temporary name, its manifest last, and renamed when everything is on disk: a folder
named step-* is complete. The manifest holds size and sha256 of every file, which train.checkpoint_health holds against them.
"""

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint.api import CheckpointException

from configs.console import ReportedError
from data_prep.files import sha256_of, writing
from data_prep.lifetime import forks_end_with_this_process
from train.checkpoint_private import noted_errors, results_manager
from train.config import CheckpointConfig

MANIFEST = "mone.json"
FORMAT = "mone-checkpoint-3"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    path: Path
    step: int
    facts: dict[str, Any]
    """What the run noted about itself: samples read, W&B run id, world size, model config."""
    files: dict[str, dict[str, Any]]
    """`size` in bytes and `sha256` by file name."""


class SaveFailed(ReportedError):
    """A checkpoint could not be written; those before it are untouched, and nothing of it has its final name."""


@dataclass(frozen=True)
class Saved:
    """What a save cost."""

    path: Path
    stall_seconds: float
    """How long training stood still for it."""
    write_seconds: float
    """From its beginning until it was published."""


class Saver:
    """Writes the checkpoints of a run, in the background if `async_save` is set; every verb is a collective."""

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.queue = AsyncCallsQueue(persistent=False)  # a persistent writer hangs on CPUs
        self.pending: _Pending | None = None
        # Writers whose training process was killed -9 would wait for one another for ever.
        forks_end_with_this_process()
        noted_errors()

    def save(self, *, step: int, state: dict[str, Any], facts: dict[str, Any]) -> None:
        """Begin to write; without async_save also finish. State: from `engine.sharded_state()`.

        One that is still being written must be finished first. Raises SaveFailed on every rank.
        """
        assert self.pending is None
        began = time.monotonic()
        unfinished = self.folder / f".unfinished-step-{step:08d}"
        state = state | {"random": _random_state()}
        _agree(functools.partial(self._make_room, unfinished, _bytes_of_all_ranks(state)), "prepare", self.folder)
        results_manager()
        request = dist_checkpointing.save(state, str(unfinished), async_sharded_save=True)
        _agree(_raise_noted, "begin", unfinished)
        if request.async_fn is not None:
            # In the process that writes, so that training does not wait for it.
            request = request._replace(async_fn=functools.partial(_write_and_digest, request.async_fn, unfinished))
        facts = {"format": FORMAT, "step": step, "world_size": dist.get_world_size(), **facts}
        self.pending = _Pending(unfinished, step, facts, began)
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
        """Publish what is completely written and prune; None if there is nothing, or (without wait) not yet.

        Raises SaveFailed on every rank.
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
        final = self.folder / f"step-{pending.step:08d}"
        _agree(functools.partial(self._publish, pending, final), "publish", final)
        now = time.monotonic()
        return Saved(final, stall_seconds=pending.stall + now - began, write_seconds=now - pending.began)

    def _make_room(self, unfinished: Path, needed: int) -> None:
        for leftover in self.folder.glob(".unfinished-*"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        # Before anything is written: where one rank runs out of space half way, the others may wait for it.
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            unfinished.rmdir()
            raise OSError(f"{free / 2**30:.3f} GiB are free and about {needed / 2**30:.3f} GiB needed")

    def _publish(self, pending: "_Pending", final: Path) -> None:
        unfinished = pending.unfinished
        _raise_noted()
        files: dict[str, Any] = {}
        for digests in unfinished.glob("digests-*.json"):
            files |= json.loads(digests.read_text())
            digests.unlink()
        for path in unfinished.iterdir():
            if path.name not in files:
                files[path.name] = digest(path)
        with writing(unfinished / MANIFEST) as temporary:
            temporary.write_text(json.dumps(pending.facts | {"files": files}, indent=1))
        _flush(unfinished)
        if final.exists():
            _delete(final)
        os.replace(unfinished, final)
        _flush(self.folder)
        every = self.config.keep_every
        published = sorted(path for path in self.folder.glob("step-*") if (path / MANIFEST).exists())
        for old in published[: -self.config.keep_last]:
            if every is None or int(old.name.removeprefix("step-")) % every:
                _delete(old)

    def _give_up(self, error: BaseException) -> None:
        assert self.pending is not None
        unfinished, self.pending = self.pending.unfinished, None
        if isinstance(error, CheckpointException):  # its own text is a page of tracebacks
            reason = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        else:
            reason = str(error)
        # torch's writer has other words for a full disk.
        reason += f"; {shutil.disk_usage(self.folder).free / 2**30:.3f} GiB are free"
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise SaveFailed(f"no checkpoint in {self.folder}: {reason}") from error


@dataclass
class _Pending:
    unfinished: Path
    step: int
    facts: dict[str, Any]
    began: float
    stall: float = 0.0
    written: bool = False


def load_checkpoint(checkpoint: Checkpoint, state: dict[str, Any], *, same_layout: bool) -> dict[str, Any]:
    """Fill a sharded state and restore the random generators; a collective on every rank.

    same_layout: elsewhere a rank's generators have no successor and keep their fresh seeds.
    """
    same_layout = same_layout and checkpoint.facts["world_size"] == dist.get_world_size()
    if same_layout:
        state = state | {"random": _random_state()}
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint.path))
    if same_layout:
        _restore_random_state(loaded.pop("random"))
    return loaded


def _agree(act: Callable[[], None], verb: str, path: Path) -> None:
    """Let rank 0 act, and raise SaveFailed on every rank if it could not."""
    outcome: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise SaveFailed(f"cannot {verb} {path}: {outcome[0]}")


def _bytes_of_all_ranks(state: dict[str, Any]) -> int:
    """Size of what the ranks will write together; a collective on every rank."""
    mine = sum(
        entry.data.nbytes
        for entry in nested_values(state)
        if isinstance(entry, ShardedBase) and torch.is_tensor(entry.data) and is_main_replica(entry.replica_id)
    )
    total = torch.tensor(mine, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return int(total.item())


def _raise_noted() -> None:
    """OSError if rank 0 could not write one of the small files that it alone writes."""
    errors = noted_errors()
    if errors:
        text = "; ".join(map(str, errors))
        errors.clear()
        raise OSError(text)


def _write_and_digest(write: Callable[..., None], folder: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Write this rank's files, then their digests beside them."""
    write(rank, *args, **kwargs)
    # Rank 0 digests what has no digest yet; an error of this rank alone would leave the others waiting.
    with contextlib.suppress(OSError):
        digests = {path.name: digest(path) for path in folder.glob(f"__{rank}_*")}
        with writing(folder / f"digests-{rank}.json") as temporary:
            temporary.write_text(json.dumps(digests))


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _delete(path: Path) -> None:
    """Take a checkpoint's name away before its content, so that none is ever half there under its name."""
    doomed = path.with_name(f".unfinished-delete-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _random_state() -> ShardedObject:
    """The generators of this rank, as tensors and numbers: to load them executes no code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "trackers": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    return ShardedObject("random", state, (dist.get_world_size(),), (dist.get_rank(),))


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    tensor_parallel.get_cuda_rng_tracker().set_states(state["trackers"])


def _flush(folder: Path) -> None:
    """Have the disk hold every file of a folder, and the folder's own entries."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
