"""Where a run continues: the checkpoints that are its own and fit its options, and what its options change from there on.

    checkpoints = find_checkpoints(config, manifests)            # ValueError if it cannot go on, or must not begin
    order, step, samples = check_continues(config, manifests, checkpoint)
    print(describe_schedule(config, checkpoint))

An option that no checkpoint of the folder agrees with is the user's to correct. A checkpoint that does not agree where an
older one does is of another run, and passed over like a damaged one.
"""

import sys
from pathlib import Path
from typing import Any

from data_prep.shards import Manifest
from mone_common.run_folder import METRICS_FILE, PUBLISHED_FILE, STATUS_FILE
from mone_common.run_records import last_published, read_published
from train.checkpoint_facts import optimizer_of
from train.checkpoint_folder import Checkpoint, list_checkpoints
from train.config import RunConfig, describe
from train.config_sections import OptimizerConfig
from train.launcher import rank_and_world_size
from train.sample_order import plan_order

JUMP = 1.01
"""A learning rate this many times that of the earlier schedule is warned of."""


def find_checkpoints(config: RunConfig, manifests: list[Manifest]) -> list[Checkpoint]:
    """The checkpoints in the run folder to choose from, oldest first; the others are named on stderr. Reads only.

    ValueError if none can be used, if the options are those of another run, or if the run has saved checkpoints before
    and none is there: to begin anew over its records would be to lose them.
    """
    folder = Path(config.run.dir)
    saves = folder / "checkpoints"
    listed, problems = list_checkpoints(saves, run=read_published(folder).get("run"))
    if config.resume == "never" and (listed or problems or (folder / METRICS_FILE).exists()):
        raise ValueError(f"resume=never: {folder} holds a run; give another run.dir or run.name, or resume=auto")
    sound = []
    for checkpoint in listed:
        try:
            _ = checkpoint.facts
            sound.append(checkpoint)
        except ValueError as error:
            problems.append(f"{checkpoint.path}: {error}")
    found = []
    for checkpoint in sound:
        if changed := differences(config, manifests, checkpoint):
            problems.append(f"{checkpoint.path}: is of another run: {', '.join(changed)}")
        else:
            found.append(checkpoint)
    if sound and not found:
        check_continues(config, manifests, sound[-1])
    tell_of_problems(problems)
    if problems and not found:
        raise ValueError(
            f"run.dir={folder}: none of its checkpoints can be loaded ({problems[-1]}); restore one, give another run.dir, "
            f"or move {saves} and the run's notes ({', '.join(_notes(folder))}) away to begin anew"
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
            print(
                f"warning: the run has saved step {published}, and the newest checkpoint in {saves} is of step "
                f"{found[-1].step}; records of later steps are kept beside {METRICS_FILE}",
                file=sys.stderr,
                flush=True,
            )
        return
    what = "holds no checkpoint" if saves.is_dir() else "is not there"
    raise ValueError(
        f"run.dir={folder}: the run has saved step {published}, and {saves} {what}; mount or restore it. To begin anew give "
        f"another run.dir or run.name, or move {', '.join(_notes(folder))} away"
    )


def _notes(folder: Path) -> list[str]:
    """The files by which a run knows what it has done."""
    return [name for name in (METRICS_FILE, PUBLISHED_FILE, STATUS_FILE) if (folder / name).exists()]


def differences(config: RunConfig, manifests: list[Manifest], checkpoint: Checkpoint) -> list[str]:
    """What of this config is not of the run that wrote a checkpoint: options with their values, and sources."""
    facts, described = checkpoint.facts, describe(config)
    saved = {f"model.{name}": value for name, value in facts.model.items()} | {"compute.precision": facts.precision}
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
    config: RunConfig, manifests: list[Manifest], checkpoint: Checkpoint | None
) -> tuple[dict[str, Any], int, int]:
    """The order of samples, the step and the samples read to go on from; ValueError if this config cannot go on."""
    if checkpoint is None:
        return plan_order(config, manifests, None, 0), 0, 0
    if changed := differences(config, manifests, checkpoint):
        raise ValueError(
            f"{checkpoint.path} is of another run: {', '.join(changed)}; restore these options, or give another run.dir"
        )
    if checkpoint.step > config.training.steps:
        raise ValueError(f"training.steps={config.training.steps}: {checkpoint.path} is already at step {checkpoint.step}")
    facts = checkpoint.facts
    return plan_order(config, manifests, facts.order, facts.samples), checkpoint.step, facts.samples


def tell_of_problems(problems: list[str]) -> None:
    """Name the checkpoints that are passed over."""
    if rank_and_world_size()[0] == 0:
        for problem in problems:
            print(f"passed over {problem}", file=sys.stderr, flush=True)


def describe_schedule(config: RunConfig, checkpoint: Checkpoint | None) -> str:
    """The schedule of the learning rate and its rate at the next step; after a resume also the earlier one where it differs.

    With a warning if the rate is higher than the earlier schedule's, and what would keep that.
    """
    optimizer, steps = config.optimizer, config.training.steps
    step = min(1 if checkpoint is None else checkpoint.step + 1, steps)
    rate = _rate(optimizer, steps, step)
    text = f"schedule  {_words(optimizer, steps)}; {rate:.3g} at step {step}"
    if checkpoint is None:
        return text
    earlier = _earlier_schedule(checkpoint)
    if earlier is None:
        return f"{text} (the checkpoint, of an earlier version, does not say what it was before)"
    if earlier == (optimizer, steps):
        return text
    before = _rate(*earlier, step)
    if before == rate and _words(*earlier) == _words(optimizer, steps):
        return text
    text += f"; before the resume {_words(*earlier)}; {before:.3g} at step {step}"
    if rate > JUMP * before:
        text += (
            f"\nwarning: the learning rate jumps from {before:.3g} to {rate:.3g}; "
            f"{' '.join(_keeping(earlier, (optimizer, steps)))} would keep the earlier schedule"
        )
    return text


Schedule = tuple[OptimizerConfig, int]
"""The optimizer's options and training.steps."""


def _earlier_schedule(checkpoint: Checkpoint) -> Schedule | None:
    facts = checkpoint.facts
    if facts.optimizer is None or facts.steps is None:
        return None
    return optimizer_of(facts.optimizer), facts.steps


def _keeping(earlier: Schedule, now: Schedule) -> list[str]:
    """The options that give the earlier schedule again."""
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
