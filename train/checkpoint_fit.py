"""Whether a checkpoint is what a run can continue from: its facts are of the right kind, its tensors those of the model.

    problem = wrong_fact(checkpoint)                      # by its manifest alone; None if all is well
    check_fits(checkpoint, engine.sharded_state(loading=True))            # by the index of its files, before any is read

Size and sha256 say that a file is what was written, not that what was written is of this model, or complete.
"""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import load_common_state_dict, load_sharded_metadata

from train.checkpoint import gather_problems
from train.checkpoint_folder import Checkpoint, printable
from train.config import OptimizerConfig

LARGEST_BATCH = 2**20
"""Samples of one step, at most: far beyond what anybody trains with, and far below what nonsense is."""
STORED_ONCE = {"optimizer_step", "scheduler"}
"""What of an engine's state is not cut into pieces."""


def wrong_fact(checkpoint: Checkpoint) -> str | None:
    """Which of the facts that a run continues by is missing or nonsense; None if none is."""
    facts, step = checkpoint.facts, checkpoint.step
    if missing := {"model", "precision", "order", "samples", "parallel", "guard", "world_size"} - facts.keys():
        return f"is of no run: its manifest says nothing of {', '.join(sorted(missing))}"
    guard, engine, experts = facts["guard"], facts.get("engine", "megatron"), facts.get("experts", "auto")
    sound = {
        "world_size": _count(facts["world_size"]) and facts["world_size"] > 0,
        "model": isinstance(facts["model"], dict),
        "parallel": isinstance(facts["parallel"], dict),
        "precision": isinstance(facts["precision"], str),
        "engine": engine in ("megatron", "deepspeed"),
        "experts": experts in ("auto", "grouped", "loop", "sparse", "skip"),
        "samples": _count(facts["samples"]) and step <= facts["samples"] <= step * LARGEST_BATCH,
        "order": _is_order(facts["order"]) and _count(facts["samples"]) and facts["order"]["start"] <= facts["samples"],
        "guard": _is_guard(guard) and all(dropped <= step for dropped in guard["dropped"]),
        "wandb_id": isinstance(facts.get("wandb_id"), str | None),
        "run": isinstance(facts.get("run"), str | None),
        "optimizer": "optimizer" not in facts or _is_optimizer(facts["optimizer"], facts.get("steps")),
    }
    wrong = next((name for name, is_sound in sound.items() if not is_sound), None)
    return wrong and f"damaged: its manifest cannot be right about {wrong}: {printable(facts.get(wrong))}"


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_guard(guard: Any) -> bool:
    return (
        isinstance(guard, dict)
        and isinstance(guard.get("dropped"), list)
        and all(map(_count, guard["dropped"]))
        and isinstance(guard.get("recent"), list)
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(_number, pair)) for pair in guard["recent"])
    )


def _is_optimizer(options: Any, steps: Any) -> bool:
    if not (isinstance(options, dict) and _count(steps) and steps > 0):
        return False
    known = {field.name for field in fields(OptimizerConfig)}
    try:
        section = OptimizerConfig(**{name: value for name, value in options.items() if name in known})
    except (TypeError, ValueError):
        return False
    warmup, end = section.warmup_steps, section.decay_steps or steps
    return warmup is not None and all(map(_count, (warmup, end, section.wsd_decay_steps or 1))) and warmup < end


def _is_order(order: Any) -> bool:
    if not (isinstance(order, dict) and _count(order.get("start")) and type(order.get("seed")) is int):
        return False
    sources, earlier = order.get("sources"), order.get("earlier")
    if not (isinstance(sources, list) and sources and isinstance(earlier, list)):
        return False
    return all(
        isinstance(source, dict)
        and isinstance(source.get("name"), str)
        and isinstance(source.get("content"), str)
        and _number(source.get("weight"))
        and source["weight"] > 0
        and _count(source.get("read"))
        for source in sources + earlier
    )


def check_fits(checkpoint: Checkpoint, state: dict[str, Any], *, whole: bool = True) -> None:
    """ValueError on every rank unless a checkpoint holds what a sharded state is to be filled with; a collective.

    whole: it must hold no other tensors. The checkpoint must have been found to execute no code.
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
        mine = printable(error)
    except Exception as error:  # whatever reading what is no checkpoint of Megatron-Core leads to
        mine = f"{type(error).__name__}: {printable(error)}"
    if problems := gather_problems(mine):
        raise ValueError(f"does not fit: {problems[0]}")


def _entries(tree: Any) -> Iterator[ShardedTensor | ShardedObject]:
    """What of nested dicts and lists has a name on disk."""
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
            # One floating-point type is converted to another.
            if found.dtype.is_floating_point != entry.dtype.is_floating_point:
                raise ValueError(f"{entry.key} is of {found.dtype}, not {entry.dtype}")


def _check_form(name: str, found: Any, expected: Any) -> None:
    """ValueError unless what is stored once for all ranks has the form of what it is to replace."""
    if isinstance(expected, dict):
        if not isinstance(found, dict) or expected.keys() - found.keys():
            raise ValueError(f"{name} is {printable(found)}")
        for key, value in expected.items():
            _check_form(f"{name}.{key}", found[key], value)
        return
    is_sound = {str: lambda value: isinstance(value, str), int: _count}.get(type(expected), _number)
    if not is_sound(found):
        raise ValueError(f"{name} is {printable(found)}")
