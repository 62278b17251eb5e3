"""Check that a checkpoint has the tensors of the model.

    check_fits(checkpoint, engine.sharded_state(loading=True))            # reads the index of its files only

Size and sha256 of the files do not prove that a checkpoint is complete or of this model.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_common_state_dict, load_sharded_metadata

from mone_common.checkpoint_folder import Checkpoint
from mone_common.checks import is_number
from mone_common.text import excerpt
from train.checkpoint import gather_problems
from train.checkpoint_facts import is_count

STORED_ONCE = {"optimizer_step", "scheduler"}
"""Entries of an engine's state that are not sharded."""


def check_fits(checkpoint: Checkpoint, state: dict[str, Any], *, whole: bool = True) -> None:
    """ValueError on every rank unless the checkpoint holds all entries of a sharded state; a collective.

    whole: the checkpoint must not hold other tensors. Call `check_executes_no_code` on the checkpoint first.
    """
    asked = list(_entries(state))
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, {entry.key for entry in asked})
    mine = None
    try:
        held = load_sharded_metadata(str(checkpoint.path))
        _check_tensors(asked, held)
        if whole and (
            others := {name for name, entry in held.items() if isinstance(entry, ShardedTensor)} - set[str]().union(*names)
        ):
            raise ValueError(f"the model has no {', '.join(sorted(others)[:3])}")
        common = load_common_state_dict(str(checkpoint.path))
        for name in STORED_ONCE & state.keys():
            _check_form(name, common.get(name), state[name])
        if "scheduler" in state and common["scheduler"]["num_steps"] != checkpoint.step:
            raise ValueError(f"its schedule is at step {common['scheduler']['num_steps']}")
    except ValueError as error:
        mine = excerpt(error)
    except Exception as error:  # an invalid checkpoint can raise anything
        mine = f"{type(error).__name__}: {excerpt(error)}"
    if problems := gather_problems(mine):
        raise ValueError(f"does not fit: {problems[0]}")


def _entries(tree: Any) -> Iterator[ShardedTensor | ShardedObject]:
    """Entries of nested dicts and lists that have a name on disk."""
    for entry in nested_values(tree):
        if isinstance(entry, ShardedTensorFactory):
            yield from _entries(entry.build())
        elif isinstance(entry, ShardedTensor | ShardedObject):
            yield entry


def _check_tensors(asked: list[ShardedTensor | ShardedObject], held: dict[str, Any]) -> None:
    for entry in asked:
        found = held.get(entry.unique_key if isinstance(entry, ShardedObject) else entry.key)
        if found is None:
            raise ValueError(f"{entry.key} is missing")
        if isinstance(entry, ShardedTensor):
            if found.global_shape != entry.global_shape:
                raise ValueError(f"{entry.key} has shape {[*found.global_shape]}, not {[*entry.global_shape]}")
            # Loading converts between floating-point types.
            if found.dtype.is_floating_point != entry.dtype.is_floating_point:
                raise ValueError(f"{entry.key} has type {found.dtype}, not {entry.dtype}")


def _check_form(name: str, found: Any, expected: Any) -> None:
    """ValueError unless an entry that is not sharded has the structure of the one that it replaces."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or expected.keys() - found.keys():
            raise ValueError(f"{name} is {excerpt(found)}")
        for key, value in expected.items():
            _check_form(f"{name}.{key}", found[key], value)
        return
    is_sound = {str: lambda value: isinstance(value, str), int: is_count}.get(type(expected), is_number)
    if not is_sound(found):
        raise ValueError(f"{name} is {excerpt(found)}")
