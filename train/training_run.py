"""A training run, from the first collective to the last.

megatron.prepare()                                        # before the import of this module
train_run(config, manifests, checkpoints, meeting)        # arguments from train.preparation and train.meeting
"""

import contextlib
import dataclasses
import functools
from typing import Any

import torch.distributed as dist

from data_prep.shards import Manifest
from mone_common.checkpoint_folder import Checkpoint
from mone_common.console import UserError
from mone_model.expert_backends import choose_backend
from train.checkpoint_facts import read_facts
from train.checkpoint_integrity import load_newest
from train.config import RunConfig, describe
from train.continuation import check_continues, describe_schedule, report_problems
from train.data import load_data
from train.description import describe_end, describe_run
from train.engines import build_engine
from train.engines.base import Engine
from train.hooks import usual_hooks
from train.launcher import ending_with_launcher
from train.loop import Trainer
from train.meeting import Meeting
from train.preparation import value_errors_as_user_errors
from train.run_notes import note_failure, write_reading, write_status
from train.runtime import distributed
from train.sample_order import describe_order, describe_reading
from train.signals import StopReason, StopRequest
from train.watchdog import EXIT_HUNG, Watchdog


def train_run(config: RunConfig, manifests: list[Manifest], checkpoints: list[Checkpoint], meeting: Meeting) -> None:
    """Build the engine, load the newest usable checkpoint, and train; a collective on every rank."""
    store, rank, world_size = meeting.store, meeting.rank, meeting.world_size
    timeout, note = config.run.timeout_minutes, functools.partial(note_failure, config, exit_code=EXIT_HUNG)
    watchdog = Watchdog(store, rank=rank, world_size=world_size, timeout=60 * timeout, note=note)
    # Collectives time out later than the watchdog, which reports more about a rank that hangs.
    joining = distributed(config.parallel, seed=config.run.seed, timeout_minutes=1.5 * timeout, store=store)
    with contextlib.closing(watchdog), ending_with_launcher() as started, joining as runtime:
        if runtime.is_main:
            print(describe_run(config, world_size), flush=True)
        weights = initial = None
        begins, branches = config.init.source is not None and not checkpoints, config.init.branch and not checkpoints
        if begins:
            from train import initial_source  # imports transformers; most runs do not need it
        if branches:
            checkpoints = agree_on_source(config, manifests)
        with value_errors_as_user_errors():
            config.compute.experts = agree_on_experts(config, checkpoints[-1] if checkpoints else None)
        if runtime.is_main:
            print(f"experts   compute.experts={config.compute.experts}", flush=True)
        if begins and not branches:
            watchdog.enter(0, "verifying the initial weights")
            weights, initial = initial_source.open_source(config, runtime.device)
            if runtime.is_main:
                print(initial_source.describe_initial(initial), flush=True)
        watchdog.enter(0, "building the model")
        engine = build_engine(config, runtime, weights)
        del weights  # which holds what it read last
        stop = StopRequest(config.run.time_limit_seconds)
        checkpoint = fill_engine(config, engine, checkpoints, watchdog, branch=branches)
        with value_errors_as_user_errors():
            order, step, read = check_continues(config, manifests, checkpoint, branch=branches)
        watchdog.enter(step, "building the order of samples")
        samples = read + (config.training.steps - step) * config.training.global_batch_size
        data = load_data(config, manifests, order, samples=samples)
        if runtime.is_main:
            write_reading(config, data.reading)
            print(describe_reading(data.reading), flush=True)
            print(describe_schedule(config, checkpoint, branch=branches), flush=True)
            changed = describe_order(order, read_facts(checkpoint).order if checkpoint is not None else None)
            if changed:
                print(changed, flush=True)
            if data.unvalidated:
                print(f"no validation on {', '.join(data.unvalidated)}: fewer held-out tokens than one sequence", flush=True)
        trainer = Trainer(config, runtime, engine, data, watchdog, stop, usual_hooks())
        if branches:
            assert checkpoint is not None
            trainer.branch(checkpoint, initial_source.note_checkpoint(config, checkpoint))
        else:
            newer = {found.step for found in checkpoints if checkpoint is not None and found.step > checkpoint.step}
            trainer.resume(checkpoint, skipped_steps=newer, initial=initial)
        started()
        reason = trainer.train()
        complete = trainer.step >= config.training.steps
        if runtime.is_main:
            write_status(config, "complete" if complete else "stopped", step=trainer.step, reason=StopReason(reason).name)
            print(describe_end(trainer, complete), flush=True)


def fill_engine(
    config: RunConfig, engine: Engine, checkpoints: list[Checkpoint], watchdog: Watchdog, *, branch: bool = False
) -> Checkpoint | None:
    """Load the newest checkpoint that is intact and fits, and return it; a collective on every rank.

    branch: the checkpoints are those of `init.source`. Returns None if there are no checkpoints; UserError if none of them
    can be loaded.
    """
    watchdog.enter(0, "verifying checkpoints")

    def state_to_fill() -> dict[str, Any]:
        watchdog.enter(0, "loading a checkpoint")
        return engine.sharded_state(loading=True)

    parallel = describe(config)["parallel"]
    checkpoint, loaded, problems = load_newest(
        checkpoints,
        state_to_fill,
        trust=config.checkpoint.trust,
        same_layout=lambda checkpoint: read_facts(checkpoint).parallel == parallel,
    )
    report_problems(problems)
    if checkpoint is not None:
        engine.load_state(loaded)
    elif branch:
        raise UserError(f"init.source={config.init.source}: none of its checkpoints can be loaded; restore one")
    elif checkpoints:
        raise UserError(f"run.dir={config.run.dir}: none of its checkpoints can be loaded; move them away to start again")
    return checkpoint


def agree_on_source(config: RunConfig, manifests: list[Manifest]) -> list[Checkpoint]:
    """The checkpoints that `init.branch` can continue from, as rank 0 sees them; a collective on every rank.

    A source that still trains adds and deletes checkpoints. UserError on every rank if the run cannot branch off them.
    """
    from train.initial_source import check_branch

    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [check_branch(config, manifests)]
        except ValueError as error:
            found = [str(error)]
    dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise UserError(found[0])
    checkpoints: list[Checkpoint] = found[0]
    return checkpoints


def agree_on_experts(config: RunConfig, checkpoint: Checkpoint | None) -> str:
    """Resolve compute.experts=auto: the backend of the checkpoint, or the fastest on rank 0; a collective on every rank.

    A resume keeps the backend, since the rounding depends on it and a resumed run must be bit-equal.
    """
    model, parallel, compute = config.model, config.parallel, config.compute
    if compute.experts != "auto":
        return choose_backend(model, parallel, compute)
    chosen = [""]
    if dist.get_rank() == 0:
        before = "auto" if checkpoint is None else read_facts(checkpoint).experts
        try:
            chosen = [choose_backend(model, parallel, dataclasses.replace(compute, experts=before))]
        except ValueError:  # this machine does not support the earlier backend
            chosen = [choose_backend(model, parallel, compute)]
    dist.broadcast_object_list(chosen)
    return chosen[0]
