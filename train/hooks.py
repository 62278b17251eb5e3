"""Hooks of the training loop: functions in three lists, called in list order on all ranks.

    hooks = usual_hooks()                            # those of every run: add a hook to one of its lists there
    Trainer(config, runtime, engine, data, watchdog, stop, hooks)

after_step  after each step, including dropped ones, and before the checkpoint of that step:
            record_step, record_neurons, validate, evaluate_text
after_save  after each published checkpoint: record_save, note_published
on_end      once, after the last checkpoint, when the run is complete or stops on request: close_records

A hook that calls a collective must call it on every rank. An exception in a hook ends the run on all ranks. Call
`trainer.watchdog.enter(trainer.step, "NAME")` before a long operation. With checkpoint.async_save, after_save runs some
steps after the save began: the step of the checkpoint is `saved.step`, not `trainer.step`.
"""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.core import parallel_state

from mone_common.files import writing
from mone_common.run_folder import PUBLISHED_FILE
from train.checkpoint import Saved
from train.data import micro_batches
from train.sources import Source

if TYPE_CHECKING:
    from train.loop import Trainer


@dataclass
class Hooks:
    """Functions that the training loop calls."""

    after_step: list[Callable[["Trainer"], None]] = field(default_factory=list)
    """Called with the trainer; its `step`, `samples` and `result` are those of the step."""
    after_save: list[Callable[["Trainer", Saved], None]] = field(default_factory=list)
    """Called with the trainer and the published checkpoint."""
    on_end: list[Callable[["Trainer"], None]] = field(default_factory=list)
    """Called with the trainer."""


def usual_hooks() -> Hooks:
    """The hooks of every run: records, figures and validation."""
    return Hooks([record_step, record_neurons, validate, evaluate_text], [record_save, note_published], [close_records])


def record_step(trainer: "Trainer") -> None:
    """Record losses, speed and memory every logging.interval steps, and at the last step."""
    if trainer.due(trainer.config.logging.interval):
        trainer.watchdog.enter(trainer.step, "recording")
        trainer.recorder.record_step(trainer.step, trainer.samples, trainer.result, dropped=len(trainer.guard.dropped))


def record_neurons(trainer: "Trainer") -> None:
    """Record expert load and neuron use every logging.neuron_interval steps; draw them every logging.figure_interval."""
    logging = trainer.config.logging
    if logging.neuron_interval > 0 and trainer.due(logging.neuron_interval):
        trainer.watchdog.enter(trainer.step, "recording")
        trainer.recorder.record_neurons(trainer.step, trainer.samples, draw=trainer.due(logging.figure_interval))


def validate(trainer: "Trainer") -> None:
    """Record the validation loss of each source and the mean, every evaluation.interval steps and at the last step."""
    if not trainer.due(trainer.config.evaluation.interval):
        return
    losses = {name: _validation_loss(trainer, source) for name, source in trainer.data.validation.items()}
    mean = trainer.recorder.record_validation(trainer.step, losses)
    trainer.validated = None if mean is None else (trainer.step, mean)


def evaluate_text(trainer: "Trainer") -> None:
    """Record the loss on each text of evaluation.text, with each validation."""
    if not trainer.due(trainer.config.evaluation.interval) or not trainer.data.evaluated:
        return
    losses = {name: _validation_loss(trainer, source) for name, source in trainer.data.evaluated.items()}
    trainer.recorder.record(trainer.step, {f"evaluation/loss/{name}": loss for name, loss in losses.items()})
    text = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    trainer.recorder.say(f"step {trainer.step}: evaluation loss {text}")


def _validation_loss(trainer: "Trainer", source: Source) -> float:
    trainer.watchdog.enter(trainer.step, "validation")
    batches = list(
        micro_batches(
            source,
            start=0,
            stop=min(trainer.config.evaluation.sequences, len(source)),
            micro_batch_size=trainer.config.training.micro_batch_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            multiple_of=trainer.config.parallel.pipeline,
        )
    )
    return trainer.engine.evaluate(iter(batches), micro_batches=len(batches))


def record_save(trainer: "Trainer", saved: Saved) -> None:
    """Record and print the time that a checkpoint took."""
    values = {"checkpoint/stall_seconds": saved.stall_seconds, "checkpoint/write_seconds": saved.write_seconds}
    text = f"step {trainer.step}: checkpoint {saved.path}, training waited {saved.stall_seconds:.1f} s"
    if trainer.steps_while_saving:
        slowdown = sum(trainer.steps_while_saving) / len(trainer.steps_while_saving) / trainer.usual_step
        values["checkpoint/step_slowdown"] = slowdown
        text += f"; {len(trainer.steps_while_saving)} steps during the save took {slowdown:.2f} times the usual time"
    trainer.recorder.record(trainer.step, values)
    trainer.recorder.say("\n".join([text, *saved.notes]))


def note_published(trainer: "Trainer", saved: Saved) -> None:
    """Write the step of the last checkpoint to published.json."""
    if trainer.runtime.is_main:
        # If this fails, as on a full disk, the record of the save has the same information.
        with contextlib.suppress(OSError), writing(Path(trainer.config.run.dir) / PUBLISHED_FILE) as temporary:
            temporary.write_text(json.dumps({"run": trainer.run_id, "step": saved.step}) + "\n")


def close_records(trainer: "Trainer") -> None:
    """Draw the losses and close the files."""
    trainer.recorder.close(trainer.step, trainer.data.unigram_entropy)
