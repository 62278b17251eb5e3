"""Convert the state of Megatron-Core's optimizers to the form of docs/checkpoints.md, which all engines share.

For each weight the checkpoint has `optimizer.state.exp_avg.<weight>`, `optimizer.state.exp_avg_sq.<weight>` and, unless the
weights are fp32, `optimizer.state.param.<weight>`, sharded like the weight, and one number of steps. Megatron-Core's form
differs: it includes the hyperparameters of parameter groups, uses two names for the master weights, and for fp32 weights
stores master weights with one of its optimizers but not with the other.
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
    """The entries to save or load, by their path in Megatron-Core's sharded state."""
    entries = {path: entry for path, _, _, entry in _leaves(nested) if isinstance(entry, Entry)}
    for path, entry in entries.items():
        if entry.key.startswith(f"{PREFIX}.fp32_param."):
            key = entry.key.replace(f"{PREFIX}.fp32_param.", f"{PREFIX}.param.")
            entries[path] = dataclasses.replace(entry, key=key)
    return {path: entry for path, entry in entries.items() if mixed_precision or not _is_master(entry)}


def fill(nested: dict[Any, Any], loaded: dict[str, torch.Tensor], step: int, optimizers: list[Any]) -> None:
    """Put the loaded tensors into Megatron-Core's sharded state, with the hyperparameters of this run.

    Load the weights of the model first: in fp32 they are the master weights.
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
    """Number of applied steps. torch's AdamW counts them per weight, Transformer Engine's per parameter group."""
    states = [state for optimizer in optimizers for state in optimizer.optimizer.state.values()]
    groups = [group for optimizer in optimizers for group in optimizer.optimizer.param_groups]
    return max((int(counted["step"]) for counted in states + groups if "step" in counted), default=0)


def _is_master(entry: Any) -> bool:
    return bool(entry.key.startswith(f"{PREFIX}.param."))


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """(path, container, key, value) of all leaves of nested dicts and lists."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        if isinstance(value, dict | list):
            yield from _leaves(value, f"{path}/{key}")
        else:
            yield f"{path}/{key}", tree, key, value
