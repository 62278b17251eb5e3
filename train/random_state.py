"""Save and restore the state of a rank's random generators.

saved = random_state()                       # a ShardedObject
problem = restore_random_state(saved.data)   # None, or the problem as text
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

from mone_common.text import excerpt


def random_state() -> ShardedObject:
    """The generators of this rank as tensors and numbers, so that loading executes no code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "trackers": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("random", state, (dist.get_world_size(),), (dist.get_rank(),))


def restore_random_state(state: Any) -> str | None:
    """Restore the generators. Returns None, or the problem of an invalid state; the generators are then unchanged."""
    before = random_state().data
    try:
        _set_random_state(state)
        if _forms(state["trackers"]) != _forms(before["trackers"]):
            raise ValueError(f"trackers {excerpt(list(state['trackers']))}")
    except Exception as error:  # an invalid state can raise anything
        _set_random_state(before)
        return f"{type(error).__name__}: {excerpt(error)}"
    return None


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    tensor_parallel.get_cuda_rng_tracker().set_states(state["trackers"])


def _forms(states: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(state, "shape", None) for name, state in states.items()}
