"""Find the checkpoints that a run can continue from, and check its options against them.

    checkpoints = find_checkpoints(config, manifests)            # ValueError if the run can neither continue nor start
    order, step, samples = check_continues(config, manifests, checkpoint)
    print(describe_schedule(config, checkpoint))

If the options match no checkpoint, the run ends with an error. If they match some of them, the others are skipped, as
damaged ones are.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from data_prep.shards import Manifest
from mone_common.checkpoint_folder import Checkpoint, list_checkpoints
from mone_common.run_folder import METRICS_FILE, PUBLISHED_FILE, STATUS_FILE
from mone_common.run_records import last_published, read_published
from mone_model.config import ModelConfig
from train.checkpoint_facts import optimizer_of, read_facts
from train.config import RunConfig, describe
from train.config_sections import OptimizerConfig
from train.launcher import rank_and_world_size
from train.sample_order import plan_order

logger = logging.getLogger(__name__)

JUMP = 1.01
"""Warn if the learning rate is more than this many times that of the earlier schedule."""


def find_checkpoints(config: RunConfig, manifests: list[Manifest]) -> list[Checkpoint]:
    """The checkpoints in the run folder that the run can continue from, oldest first. Does not write to the folder.

    Logs the others. ValueError if none of them can be used, if the options are those of another run, or if all
    checkpoints of the run have disappeared: a new start would lose its records.
    """
    folder = Path(config.run.dir)
    saves = folder / "checkpoints"
    listed, problems = list_checkpoints(saves, run=read_published(folder).get("run"))
    if config.resume == "never" and (listed or problems or (folder / METRICS_FILE).exists()):
        raise ValueError(f"resume=never: {folder} holds a run; give another run.dir or run.name, or resume=auto")
    sound = []
    for checkpoint in listed:
        try:
            _ = read_facts(checkpoint)
            sound.append(checkpoint)
        except ValueError as error:
            problems.append(f"{checkpoint.path}: {error}")
    found = []
    for checkpoint in sound:
        if changed := differences(config, manifests, checkpoint):
            problems.append(f"{checkpoint.path}: belongs to another run: {', '.join(changed)}")
        else:
            found.append(checkpoint)
    if sound and not found:
        check_continues(config, manifests, sound[-1])
    report_problems(problems)
    if problems and not found:
        raise ValueError(
            f"run.dir={folder}: none of its checkpoints can be loaded ({problems[-1]}); restore one, give another run.dir, "
            f"or move {saves} and the run's records ({', '.join(_notes(folder))}) away to start again"
        )
    if found:
        check_continues(config, manifests, found[-1])
    _check_nothing_vanished(folder, saves, found, problems)
    return found


def _check_nothing_vanished(folder: Path, saves: Path, found: list[Checkpoint], problems: list[str]) -> None:
    published = last_published(folder)
    if published is None or problems or (found and found[-1].step >= published):
        return
    if found:
        if rank_and_world_size()[0] == 0:
            logger.warning(
                "the run saved step %d, but the newest checkpoint in %s is of step %d; records of later steps are kept "
                "beside %s",
                published,
                saves,
                found[-1].step,
                METRICS_FILE,
            )
        return
    what = "holds no checkpoint" if saves.is_dir() else "does not exist"
    raise ValueError(
        f"run.dir={folder}: the run saved step {published}, but {saves} {what}; mount or restore it. To start again, give "
        f"another run.dir or run.name, or move {', '.join(_notes(folder))} away"
    )


def _notes(folder: Path) -> list[str]:
    """The files in the run folder that record the run's progress."""
    return [name for name in (METRICS_FILE, PUBLISHED_FILE, STATUS_FILE) if (folder / name).exists()]


def differences(config: RunConfig, manifests: list[Manifest], checkpoint: Checkpoint) -> list[str]:
    """Options and sources of this config that differ from those of the run that wrote the checkpoint."""
    facts, described = read_facts(checkpoint), describe(config)
    # Options that an earlier version did not have are what they are by default.
    model = dataclasses.asdict(ModelConfig()) | facts.model
    saved = {f"model.{name}": value for name, value in model.items()} | {"compute.precision": facts.precision}
    ours = {f"model.{name}": value for name, value in described["model"].items()}
    ours["compute.precision"] = config.compute.precision
    changed = [f"{name}={value} (saved: {saved.get(name)})" for name, value in ours.items() if saved.get(name) != value]
    if config.data.seed is not None and config.run.seed != facts.seed:
        changed.append(f"run.seed={config.run.seed} (saved: {facts.seed})")
    try:
        plan_order(config, manifests, facts.order, facts.samples)
    except ValueError as error:
        changed.append(str(error))
    return changed


def check_continues(
    config: RunConfig, manifests: list[Manifest], checkpoint: Checkpoint | None, *, branch: bool = False
) -> tuple[dict[str, Any], int, int]:
    """The order of samples, the step and the number of samples read at the start of this run.

    ValueError if this config cannot continue from the checkpoint. checkpoint: None at the start of a new run. branch: it is
    that of another run, whose model may differ as `initial_source.check_source` allows.
    """
    if checkpoint is None:
        return plan_order(config, manifests, None, 0), 0, 0
    if not branch and (changed := differences(config, manifests, checkpoint)):
        raise ValueError(
            f"{checkpoint.path} belongs to another run: {', '.join(changed)}; restore these options, or give another run.dir"
        )
    if checkpoint.step > config.training.steps:
        raise ValueError(f"training.steps={config.training.steps}: {checkpoint.path} is already at step {checkpoint.step}")
    facts = read_facts(checkpoint)
    return plan_order(config, manifests, facts.order, facts.samples), checkpoint.step, facts.samples


def report_problems(problems: list[str]) -> None:
    """Log the checkpoints that are skipped, and why, on rank 0."""
    if rank_and_world_size()[0] == 0:
        for problem in problems:
            logger.info("skipped %s", problem)


def describe_schedule(config: RunConfig, checkpoint: Checkpoint | None, *, branch: bool = False) -> str:
    """The learning-rate schedule and the rate of the next step; also the schedule of the checkpoint if it differs.

    Includes a warning if the rate is higher than with that schedule, and the options that keep it. branch: the checkpoint is
    that of another run.
    """
    optimizer, steps = config.optimizer, config.training.steps
    step = min(1 if checkpoint is None else checkpoint.step + 1, steps)
    rate = _rate(optimizer, steps, step)
    text = f"schedule  {_words(optimizer, steps)}; {rate:.3g} at step {step}"
    if checkpoint is None:
        return text
    earlier = _earlier_schedule(checkpoint)
    if earlier is None:
        return f"{text} (the checkpoint is of an earlier version and does not record the schedule)"
    if earlier == (optimizer, steps):
        return text
    before = _rate(*earlier, step)
    if before == rate and _words(*earlier) == _words(optimizer, steps):
        return text
    text += f"; {'in the source' if branch else 'before the resume'} {_words(*earlier)}; {before:.3g} at step {step}"
    if rate > JUMP * before:
        text += (
            f"\nwarning: the learning rate jumps from {before:.3g} to {rate:.3g}; "
            f"{' '.join(_keeping(earlier, (optimizer, steps)))} would keep the earlier schedule"
        )
    return text


Schedule = tuple[OptimizerConfig, int]
"""The optimizer's options and training.steps."""


def _earlier_schedule(checkpoint: Checkpoint) -> Schedule | None:
    facts = read_facts(checkpoint)
    if facts.optimizer is None or facts.steps is None:
        return None
    return optimizer_of(facts.optimizer), facts.steps


def _keeping(earlier: Schedule, now: Schedule) -> list[str]:
    """The options that keep the earlier schedule."""
    (before, _), (after, _) = earlier, now
    options = {
        name: getattr(before, name)
        for name in ("lr", "min_lr", "schedule", "warmup_steps", "wsd_decay_steps")
        if getattr(before, name) != getattr(after, name)
    }
    if _end(*earlier) != _end(*now):
        options["decay_steps"] = _end(*earlier)
    return [f"optimizer.{name}={'null' if value is None else value}" for name, value in options.items()]


def _end(optimizer: OptimizerConfig, steps: int) -> int:
    return optimizer.decay_steps or steps


def _words(optimizer: OptimizerConfig, steps: int) -> str:
    warmup = f"{optimizer.warmup_steps} steps of warm-up to {optimizer.lr:g}"
    if optimizer.schedule == "constant":
        return f"constant, {warmup}"
    decay = (
        "" if optimizer.schedule != "wsd" else f" in the last {optimizer.wsd_decay_steps or _end(optimizer, steps) // 10}"
    )
    return f"{optimizer.schedule}, {warmup}, {optimizer.min_lr:g} at step {_end(optimizer, steps)}{decay}"


def _rate(optimizer: OptimizerConfig, steps: int, step: int) -> float:
    from train.engines.base import learning_rate

    return learning_rate(optimizer, steps, step)
