"""Checkpoints: save, publish, prune, find the newest complete one, load. Megatron-Core's sharded format.

    save_checkpoint(folder, step=200, state=engine.sharded_state(), facts={...}, keep_last=2)
    newest = find_newest(folder)                 # None, or one whose manifest was written, so all of it is there
    engine.load_state(load_checkpoint(newest, engine.sharded_state(loading=True)))

A checkpoint is written under a temporary name, its manifest last, and renamed when everything is on disk: a folder
named step-* is complete.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

MANIFEST = "mone.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    facts: dict[str, Any]
    """What the run noted about itself: tokens seen, W&B run id, world size, model config."""


def save_checkpoint(folder: Path, *, step: int, state: dict[str, Any], facts: dict[str, Any], keep_last: int) -> None:
    """Write, publish and prune; a collective on every rank. State: from `engine.sharded_state()`."""
    final, unfinished = folder / f"step-{step:08d}", folder / f".unfinished-step-{step:08d}"
    is_main = dist.get_rank() == 0
    if is_main:
        for leftover in folder.glob(".unfinished-*"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state | {"random": _random_state()}, str(unfinished))
    dist.barrier()
    if is_main:
        facts = {"format": "mone-checkpoint-1", "step": step, "world_size": dist.get_world_size(), **facts}
        _write_durably(unfinished / MANIFEST, json.dumps(facts, indent=1))
        _flush(unfinished)
        if final.exists():
            _delete(final)
        os.replace(unfinished, final)
        _flush(folder)
        for old in list_checkpoints(folder)[:-keep_last]:
            _delete(old.path)
    dist.barrier()


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in a folder, oldest first."""
    found = []
    for manifest in sorted(folder.glob(f"step-*/{MANIFEST}")):
        facts = json.loads(manifest.read_text())
        found.append(Checkpoint(manifest.parent, facts["step"], facts))
    return found


def find_newest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    return max(list_checkpoints(folder), key=lambda checkpoint: checkpoint.step, default=None)


def load_checkpoint(checkpoint: Checkpoint, state: dict[str, Any], *, with_random_state: bool) -> dict[str, Any]:
    """Fill a sharded state and restore the random generators; a collective on every rank.

    with_random_state: on the same layout only; elsewhere a rank's generators have no successor and keep their fresh seeds.
    """
    same_world = with_random_state and checkpoint.facts["world_size"] == dist.get_world_size()
    if same_world:
        state = state | {"random": _random_state()}
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint.path))
    if same_world:
        _restore_random_state(loaded.pop("random"))
    return loaded


def _delete(path: Path) -> None:
    """Take a checkpoint's name away before its content, so that none is ever half there under its name."""
    doomed = path.with_name(f".unfinished-delete-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _random_state() -> ShardedObject:
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "numpy": np.random.get_state(),
        "trackers": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("random", state, (dist.get_world_size(),), (dist.get_rank(),))


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["trackers"])


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Have the disk hold every file of a folder, and the folder's own entries."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
