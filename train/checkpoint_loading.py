"""Load a checkpoint, collectively on all ranks.

    engine.load_state(load_checkpoint(checkpoint, engine.sharded_state(loading=True), same_layout=True))

`train.checkpoint_integrity` chooses the checkpoint to load.
"""

from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from mone_common.checkpoint_folder import Checkpoint
from train.checkpoint import find_not_finite, gather_problems, reason_of
from train.checkpoint_facts import read_facts
from train.random_state import random_state, restore_random_state


def load_checkpoint(checkpoint: Checkpoint, state: dict[str, Any], *, same_layout: bool) -> dict[str, Any]:
    """Fill a sharded state and restore the random generators; a collective on every rank.

    same_layout: whether this run has the layout of the checkpoint; if not, the generators keep their new seeds. ValueError
    on every rank, with the state partly filled, if a file is damaged or numbers are not finite.
    """
    same_layout = same_layout and read_facts(checkpoint).world_size == dist.get_world_size()
    if same_layout:
        state = state | {"random": random_state()}
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(checkpoint.path))
    except CheckpointException as error:  # which torch raises on every rank
        raise ValueError(f"damaged: {reason_of(error)}") from error
    random = loaded.pop("random") if same_layout else None
    if found := find_not_finite(loaded):
        raise ValueError(f"refused: {found} is not finite")
    if same_layout and (problems := gather_problems(restore_random_state(random))):
        raise ValueError(f"damaged: the random state of {problems[0]}")
    return loaded
