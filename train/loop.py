"""The training loop. Records, figures, validation and extensions are hooks (`train.hooks`).

trainer = Trainer(config, runtime, engine, data, watchdog, stop, usual_hooks())
trainer.resume(checkpoint)
reason = trainer.train()
"""

import contextlib
import functools
import gc
import math
import time
import uuid
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from data_prep.errors import DataError
from mone_common.checkpoint_folder import Checkpoint
from mone_common.run_records import read_published
from mone_model.megatron.gpt import set_active_neurons
from train.checkpoint import NotFinite, SaveFailed, Saver
from train.checkpoint_facts import CheckpointFacts, read_facts
from train.config import RunConfig, describe
from train.data import RunData, micro_batches
from train.engines.base import Engine
from train.guards import Diverged, StepGuard
from train.hooks import Hooks
from train.recorder import Recorder
from train.runtime import Runtime
from train.signals import StopReason, StopRequest
from train.sources import Batch
from train.watchdog import Watchdog


class DataChanged(DataError):
    """A shard changed while it was read."""

    of_all_ranks = True


class Trainer:
    """Trains a model with an engine."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        engine: Engine,
        data: RunData,
        watchdog: Watchdog,
        stop: StopRequest,
        hooks: Hooks,
    ) -> None:
        self.config, self.runtime, self.engine, self.data = config, runtime, engine, data
        self.watchdog, self.stop, self.hooks = watchdog, stop, hooks
        self.step, self.samples = 0, 0
        self.learned = False
        """Whether a step was applied since the last checkpoint."""
        self.validated: tuple[int, float] | None = None
        """Step and mean loss of the last validation."""
        self.saver = Saver(self.checkpoints, config.checkpoint)
        self.slowest_step, self.slowest_save = 0.0, 0.0
        self.usual_step = 0.0
        """Running mean of the seconds per step while no checkpoint is written."""
        self.steps_while_saving: list[float] = []
        """Seconds of each step during the current save."""

    def resume(
        self,
        checkpoint: Checkpoint | None,
        *,
        skipped_steps: Set[int] = frozenset(),
        initial: dict[str, Any] | None = None,
    ) -> None:
        """Set the step and open the records.

        checkpoint: the one that the engine was loaded from; None for a new run. skipped_steps: steps of newer checkpoints
        that were skipped. initial: where the weights of a new run came from; a resumed one has it from the checkpoint.
        """
        if checkpoint is None:
            self._begin(0, None, run_id=None, wandb_id=None, initial=initial)
            return
        facts = read_facts(checkpoint)
        self.saver.resumed(checkpoint.step, skipped_steps=skipped_steps)
        self._begin(checkpoint.step, facts, run_id=facts.run, wandb_id=facts.wandb_id, initial=facts.initial)
        self.recorder.say(f"resumed from {checkpoint.path} at step {self.step}")

    def branch(self, checkpoint: Checkpoint, initial: dict[str, Any]) -> None:
        """Begin a new run where a checkpoint of another run ended, and open the records.

        checkpoint: the one that the engine was loaded from. initial: what is recorded of it.
        """
        self._begin(checkpoint.step, read_facts(checkpoint), run_id=None, wandb_id=None, initial=initial)
        # Where the tokens of the source end and those of the branch begin.
        self.recorder.record(self.step, {"train/tokens": float(self.samples * self.config.model.seq_length)})
        self.recorder.say(f"branched off {checkpoint.path} at step {self.step}")

    def _begin(
        self,
        step: int,
        facts: CheckpointFacts | None,
        *,
        run_id: str | None,
        wandb_id: str | None,
        initial: dict[str, Any] | None,
    ) -> None:
        self.step, self.samples = step, facts.samples if facts else 0
        self.initial, self.began_at = initial, step
        self.run_id = self._agree_on_id(run_id)
        self.guard = StepGuard(self.config.guard, self.runtime.device, facts.guard if facts else None)
        self.recorder = Recorder(
            self.config,
            self.runtime,
            self.engine.modules,
            resume_step=self.step,
            samples=self.samples,
            wandb_id=wandb_id,
        )

    def train(self) -> StopReason:
        """Train until the last step or until a reason to stop, and return the reason.

        Raises Diverged if too many steps were dropped, NotFinite if weights are not finite, DataChanged if a shard changed,
        and SaveFailed if the last checkpoint cannot be written.
        """
        # Megatron-Core collects garbage in each save. Exclude the objects up to here, which live as long as the run.
        gc.collect()
        gc.freeze()
        try:
            return self._train()
        except (Diverged, NotFinite, DataChanged):
            # Every rank raises these after the same step. A checkpoint that is being written is of an earlier step.
            self.finish_saving(wait=True)
            raise
        finally:
            gc.unfreeze()

    def _train(self) -> StopReason:
        batches = self._training_batches()
        reason = StopReason.NONE
        while not self.is_last and reason is StopReason.NONE:
            self.step += 1
            self.train_step(batches)
            reason = self.reason_to_stop()
            for after_step in self.hooks.after_step:
                after_step(self)
            self.check_end()
            self.finish_saving(wait=False)
            self.save_if_due(must=self.is_last or reason is not StopReason.NONE)
        self.finish_saving(wait=True, must=True)
        for on_end in self.hooks.on_end:
            on_end(self)
        return reason

    @property
    def is_last(self) -> bool:
        """Whether this is the last step of the run."""
        return self.step >= self.config.training.steps

    def due(self, interval: int) -> bool:
        """Whether this step is a multiple of `interval`, or the last; interval 0: only the last."""
        return self.is_last or (interval > 0 and self.step % interval == 0)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step, which the guard may drop."""
        self.watchdog.enter(self.step, "forward and backward")
        if self.config.model.activation_ratio_schedule:
            set_active_neurons(self.engine.modules, self.config.model.at_step(self.step))
        self.recorder.begin_step()
        began = time.monotonic()
        self.result = self.engine.train_step(
            batches,
            micro_batches=self.config.micro_batches(self.runtime.world_size),
            accept=functools.partial(self.guard.accepts, self.step),
        )
        seconds = time.monotonic() - began
        self.recorder.end_step(seconds)
        self.slowest_step = max(self.slowest_step, seconds)
        if self.saver.pending is None:
            self.usual_step = 0.9 * (self.usual_step or seconds) + 0.1 * seconds
        else:
            self.steps_while_saving.append(seconds)
        self.samples += self.config.training.global_batch_size
        self.learned |= self.result.applied
        if not self.result.applied:
            self.recorder.say(f"step {self.step}: dropped, {self.guard.reason}")
            self.guard.check_budget(self.step, since=self.began_at)

    def reason_to_stop(self) -> StopReason:
        """The reason to stop of any rank, the same on every rank. Raises DataChanged."""
        self.watchdog.enter(self.step, "agreeing whether to stop")
        looks = self.due(self.config.logging.interval) or self.due(self.config.checkpoint.interval)
        if self.runtime.is_main and (looks or self.stop.noted) and self.data.changed_file() is not None:
            self.stop.note(StopReason.DATA)
        if self.step == self.config.run.stop_at_step:
            self.stop.note(StopReason.STEP)
        # A checkpoint takes a few seconds even for a tiny model. None may have been written yet.
        reserve = 2 * (self.slowest_step + max(5.0, self.slowest_save))
        reason = self.stop.agreed(self.runtime.device, reserve_seconds=reserve)
        if reason is StopReason.DATA:
            raise DataChanged(f"data.blend: {self.data.changed_file() or 'a shard'} changed while it was read; not saved")
        return reason

    def check_end(self) -> None:
        """After the last step, raise Diverged on every rank if no recent step was applied or the loss is not finite."""
        if not self.is_last:
            return
        self.guard.check_progress(self.step, since=self.began_at)
        if self.validated is not None and not math.isfinite(self.validated[1]):
            raise Diverged(
                f"the validation loss of the last step, {self.step}, is {self.validated[1]}: the step is not saved. Earlier "
                "checkpoints are intact; try a lower optimizer.lr"
            )

    def save_if_due(self, *, must: bool) -> None:
        """Save if `must`, or every checkpoint.interval steps if the weights have changed since the last checkpoint."""
        if not (must or self.due(self.config.checkpoint.interval)):
            return
        if must or self.learned:
            self.save(must=must)
        else:  # a new checkpoint would delete an older one, which may have better weights
            self.recorder.say(f"step {self.step}: no checkpoint, since no step was applied after the last one")

    def save(self, *, must: bool) -> None:
        """Write a checkpoint, or start to with async_save. A failure raises SaveFailed if `must`, else it is printed."""
        self.watchdog.enter(self.step, "saving")
        facts = self._facts()
        self.finish_saving(wait=True)
        with self._tolerating_failure(must):
            self.saver.save(step=self.step, state=self.engine.sharded_state(), facts=facts)
            self.learned = False
        self.finish_saving(wait=False, must=must)

    def _facts(self) -> CheckpointFacts:
        """The facts that a resume needs; a collective on every rank."""
        described = describe(self.config)
        return CheckpointFacts(
            world_size=self.runtime.world_size,
            samples=self.samples,
            model=described["model"],
            parallel=described["parallel"],
            precision=self.config.compute.precision,
            order=self.data.order,
            guard=self.guard.state(),
            seed=self.config.run.seed,
            engine=self.config.engine,
            experts=self.config.compute.experts,
            run=self.run_id,
            wandb_id=self.recorder.wandb_id(),
            optimizer=described["optimizer"],
            steps=self.config.training.steps,
            initial=self.initial,
        )

    def finish_saving(self, *, wait: bool, must: bool = False) -> None:
        """Publish the checkpoint if it is written, and call the after_save hooks."""
        if self.saver.pending is None:
            return
        self.watchdog.enter(self.step, "finishing a save")
        with self._tolerating_failure(must):
            saved = self.saver.finish(wait=wait)
            if saved is not None:
                self.slowest_save = max(self.slowest_save, saved.write_seconds)
                for after_save in self.hooks.after_save:
                    after_save(self, saved)
                self.steps_while_saving = []

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return Path(self.config.run.dir) / "checkpoints"

    @contextlib.contextmanager
    def _tolerating_failure(self, must: bool) -> Iterator[None]:
        """Record and print SaveFailed and continue, unless the checkpoint must be written."""
        try:
            yield
        except SaveFailed as error:
            if must or isinstance(error, NotFinite):
                raise
            self.recorder.record(self.step, {"checkpoint/failed": 1.0})
            self.recorder.say(f"step {self.step}: {error}; training continues until the next checkpoint")

    def _agree_on_id(self, saved: str | None) -> str:
        """The id of the run, the same on every rank: the saved one, or a new one."""
        agreed = [saved or read_published(Path(self.config.run.dir)).get("run") or uuid.uuid4().hex]
        dist.broadcast_object_list(agreed)
        return str(agreed[0])

    def _training_batches(self) -> Iterator[Batch]:
        training, first = self.config.training, self.data.order["start"]
        return self._watched(
            micro_batches(
                self.data.train,
                start=self.samples - first,
                stop=len(self.data.train),
                micro_batch_size=training.micro_batch_size,
                data_rank=parallel_state.get_data_parallel_rank(),
                data_size=parallel_state.get_data_parallel_world_size(),
                num_workers=self.config.data.num_workers,
            )
        )

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the watchdog gets the phase while one is read."""
        iterator = iter(batches)
        while True:
            self.watchdog.enter(self.step, "reading data")
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.watchdog.enter(self.step, "forward and backward")
            yield batch
