"""The state of Megatron-Core's optimizers in the form of `docs/checkpoints.md`, which no engine has to itself.

On disk there are, for each weight, `optimizer.state.exp_avg.<weight>`, `optimizer.state.exp_avg_sq.<weight>` and, unless
the weights themselves are fp32, `optimizer.state.param.<weight>`, sharded as the weight is; and one number of steps.
Megatron-Core writes nearly that, but wraps it in the hyperparameters of its parameter groups, has two names for the
master weights, and keeps them in fp32 with one kind of optimizer and not with the other.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

Entry = (ShardedTensor, ShardedTensorFactory)
PREFIX = "optimizer.state"


def common_form(nested: dict[str, Any], *, mixed_precision: bool) -> dict[str, Any]:
    """What is to be saved or loaded, by its place in Megatron-Core's own sharded state."""
    entries = {path: entry for path, _, _, entry in _leaves(nested) if isinstance(entry, Entry)}
    for path, entry in entries.items():
        if entry.key.startswith(f"{PREFIX}.fp32_param."):
            key = entry.key.replace(f"{PREFIX}.fp32_param.", f"{PREFIX}.param.")
            entries[path] = dataclasses.replace(entry, key=key)
    return {path: entry for path, entry in entries.items() if mixed_precision or not _is_master(entry)}


def fill(nested: dict[Any, Any], loaded: dict[str, torch.Tensor], step: int, optimizers: list[Any]) -> None:
    """Put what was loaded into Megatron-Core's own sharded state, with this run's hyperparameters.

    The weights of the model must have been loaded before: in fp32 they are the master weights.
    """
    for path, container, key, value in list(_leaves(nested)):
        if isinstance(value, Entry):
            container[key] = loaded.get(path)
        elif isinstance(value, LocalNonpersistentObject):
            container[key] = value.unwrap()
    for index, optimizer in enumerate(optimizers):
        part = nested[index] if len(optimizers) > 1 else nested
        inner = part.get("optimizer", part)
        for group in inner["param_groups"]:
            group["step"] = float(step)
        if isinstance(optimizer, DistributedOptimizer):
            weights = [weight for buffer in optimizer.buffers for weight in buffer.param_index_map]
            for number, tensors in part["param_state"].items():
                if tensors["param"] is None:
                    tensors["param"] = weights[number].data
        else:
            inner["state"]["common_step"] = torch.tensor(float(step))


def steps_taken(optimizers: list[Any]) -> int:
    """Steps that changed the weights; torch's AdamW counts them for each weight, Transformer Engine's for each group."""
    states = [state for optimizer in optimizers for state in optimizer.optimizer.state.values()]
    groups = [group for optimizer in optimizers for group in optimizer.optimizer.param_groups]
    return max((int(counted["step"]) for counted in states + groups if "step" in counted), default=0)


def _is_master(entry: Any) -> bool:
    return bool(entry.key.startswith(f"{PREFIX}.param."))


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """(path, container, key in it, value) of everything in nested dicts and lists."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if isinstance(value, dict | list):
            yield from _leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", tree, key, value
