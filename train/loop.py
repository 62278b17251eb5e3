"""The training loop: a list of verbs, the same on every rank.

trainer = Trainer(config, runtime, engine, data)
trainer.resume(find_newest(folder))
trainer.train()
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mone_model.accounting import count_flops
from mone_model.gpt import moe_layers
from mone_model.loss_record import LossRecord, reduce_losses
from mone_model.neuron_stats import NeuronUsage, reduce_counters, summarise_experts, summarise_neurons
from train import figures
from train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from train.config import RunConfig, describe
from train.data import RunData, SourceEpochs, micro_batches
from train.engines.base import StepResult
from train.engines.megatron import MegatronEngine
from train.metrics import MetricsWriter, format_line, read_metrics
from train.runtime import Runtime
from train.signals import StopRequest


class Trainer:
    """Drives an engine through the steps of a run and records what happens."""

    def __init__(self, config: RunConfig, runtime: Runtime, engine: MegatronEngine, data: RunData) -> None:
        self.config, self.runtime, self.engine, self.data = config, runtime, engine, data
        self.folder = Path(config.run.dir)
        self.step = 0
        self.samples = 0
        self.layers = [layer for module in engine.modules for layer in moe_layers(module)]
        self.stop = StopRequest()
        self.writer: MetricsWriter | None = None
        self.steps_timed, self.seconds = 0, 0.0
        self.samples_counted_from = 0
        self.validation_loss: float | None = None

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Continue from a checkpoint, or begin with None, and open the records."""
        check_agreed(checkpoint, self.runtime.device)
        if checkpoint is not None:
            same_layout = checkpoint.facts["parallel"] == describe(self.config)["parallel"]
            state = self.engine.sharded_state(loading=True)
            self.engine.load_state(load_checkpoint(checkpoint, state, with_random_state=same_layout))
            self.step, self.samples = checkpoint.step, checkpoint.facts["samples"]
            self._say(f"resumed from {checkpoint.path} at step {self.step}")
        if self.runtime.is_main:
            wandb_id = checkpoint.facts["wandb_id"] if checkpoint else None
            self.writer = MetricsWriter(self.config, self.folder, resume_step=self.step, wandb_id=wandb_id)

    def train(self) -> bool:
        """Train to the last step, or until a signal; whether the run is complete."""
        config, steps = self.config, self.config.training.steps
        batches = self._training_batches()
        self.samples_counted_from = self.samples
        self._count_neurons()
        stopping = False
        while self.step < steps and not stopping:
            self.step += 1
            self.begin_records()
            began = time.monotonic()
            result = self.engine.train_step(batches, micro_batches=config.micro_batches(self.runtime.world_size))
            self.steps_timed, self.seconds = self.steps_timed + 1, self.seconds + time.monotonic() - began
            self.samples += config.training.global_batch_size
            stop_if_diverged(self.step, result)
            last = self.step == steps
            stopping = self.stop.agreed(self.runtime.device) or self.step == config.run.stop_at_step
            if self._due(config.logging.interval, last):
                self.record(result)
            if config.logging.neuron_interval and self._due(config.logging.neuron_interval, last):
                self.record_neurons(last)
            if self._due(config.evaluation.interval, last):
                self.validate()
            if self._due(config.checkpoint.interval, last or stopping):
                self.save()
        if self.writer is not None:
            self._draw_losses()
            self.writer.close()
        return self.step >= steps

    def begin_records(self) -> None:
        """Forget the auxiliary losses of earlier steps: a record is of its own step."""
        for record in self._records():
            record.reset()

    def record(self, result: StepResult) -> None:
        """Write losses, speed and memory of this step."""
        names = auxiliary_loss_names(self.config)
        losses = reduce_losses(self._records_by_layer(), names=names, num_layers=self.config.model.num_layers)
        memory = self._peak_memory_gib()
        if self.writer is None:
            return
        seconds_a_step = self.seconds / self.steps_timed
        self.steps_timed, self.seconds = 0, 0.0
        tokens_a_second = self.config.training.global_batch_size * self.config.model.seq_length / seconds_a_step
        values = {
            "train/loss": result.loss,
            **{f"aux/{name}": loss.mean().item() for name, loss in losses.items()},
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": result.learning_rate,
            "train/tokens": float(self.samples * self.config.model.seq_length),
            "speed/tokens_per_second": tokens_a_second,
            "speed/flops_per_second": 3 * count_flops(self.config.model).dense * tokens_a_second,
            "memory/peak_gib": memory,
        }
        self.writer.write(self.step, values)
        eta = (self.config.training.steps - self.step) * seconds_a_step
        self._say(format_line(self.step, self.config.training.steps, values, eta))

    def record_neurons(self, last: bool) -> None:
        """Write expert load and neuron statistics since the last such record, and now and then pictures."""
        usage = reduce_counters(
            {layer: experts.counters for layer, experts, _ in self.layers if experts.counters is not None},
            num_layers=self.config.model.num_layers,
            num_experts=self.config.model.num_experts,
            num_neurons=self.config.model.moe_ffn_hidden_size,
            expert_rank=parallel_state.get_expert_model_parallel_rank(),
            expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        )
        self._count_neurons()
        routed = (self.samples - self.samples_counted_from) * self.config.model.seq_length * self.config.model.router_topk
        self.samples_counted_from = self.samples
        if self.writer is None:
            return
        summary = {f"expert/{name}": values for name, values in summarise_experts(usage).items()}
        summary["expert/dropped"] = 1 - usage.tokens_LE.sum(-1) / routed
        summary |= {
            f"neuron/{name}": values for name, values in summarise_neurons(usage, self.config.model.active_neurons).items()
        }
        by_layer = {
            f"{name}/layer_{layer:02d}": value
            for name, values in summary.items()
            for layer, value in enumerate(values.tolist())
        }
        self.writer.write(self.step, {name: values.mean().item() for name, values in summary.items()} | by_layer)
        if self._due(self.config.logging.figure_interval, last):
            self._draw_usage(usage)

    def validate(self) -> None:
        """Write the validation loss of each source, and their mean."""
        losses = {name: self._validation_loss(source) for name, source in self.data.validation.items()}
        if self.writer is None or not losses:
            return
        self.validation_loss = mean = sum(losses.values()) / len(losses)
        self.writer.write(
            self.step, {"validation/loss": mean} | {f"validation/loss/{name}": loss for name, loss in losses.items()}
        )
        self._say(
            f"step {self.step}: validation loss {mean:.4f} ("
            + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            + ")"
        )

    def save(self) -> None:
        """Write a checkpoint."""
        wandb_id = [self.writer.wandb_id if self.writer is not None else None]
        dist.broadcast_object_list(wandb_id)
        described = describe(self.config)
        facts = {
            "samples": self.samples,
            "wandb_id": wandb_id[0],
            "model": described["model"],
            "parallel": described["parallel"],
            "order": self.data.identity,
        }
        save_checkpoint(
            self.checkpoints,
            step=self.step,
            state=self.engine.sharded_state(),
            facts=facts,
            keep_last=self.config.checkpoint.keep_last,
        )
        self._say(f"step {self.step}: checkpoint in {self.checkpoints}")

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    def _due(self, interval: int, last: bool) -> bool:
        return last or (interval > 0 and self.step % interval == 0)

    def _training_batches(self) -> Any:
        training = self.config.training
        return micro_batches(
            self.data.train,
            start=self.samples,
            stop=len(self.data.train),
            micro_batch_size=training.micro_batch_size,
            data_rank=parallel_state.get_data_parallel_rank(),
            data_size=parallel_state.get_data_parallel_world_size(),
            num_workers=self.config.data.num_workers,
        )

    def _validation_loss(self, source: SourceEpochs) -> float:
        batches = list(
            micro_batches(
                source,
                start=0,
                stop=min(self.config.evaluation.sequences, len(source)),
                micro_batch_size=self.config.training.micro_batch_size,
                data_rank=parallel_state.get_data_parallel_rank(),
                data_size=parallel_state.get_data_parallel_world_size(),
                multiple_of=self.config.parallel.pipeline,
            )
        )
        return self.engine.evaluate(iter(batches), micro_batches=len(batches))

    def _records_by_layer(self) -> dict[int, list[LossRecord]]:
        return {layer: [experts.record, router.record] for layer, experts, router in self.layers}

    def _records(self) -> list[LossRecord]:
        return [record for records in self._records_by_layer().values() for record in records]

    def _count_neurons(self) -> None:
        for _, experts, _ in self.layers:
            experts.counting_neurons = self.config.logging.neuron_interval > 0
            if experts.counters is not None:
                experts.counters.reset()

    def _peak_memory_gib(self) -> float:
        """Of the fullest rank: device memory on GPUs, resident memory of the process elsewhere."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak_tensor = torch.tensor(peak, dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(peak_tensor, op=dist.ReduceOp.MAX)
        return peak_tensor.item() / 2**30

    def _draw_usage(self, usage: NeuronUsage) -> None:
        assert self.writer is not None
        load, use = self.folder / "figures/expert_load.png", self.folder / "figures/neuron_use.png"
        figures.draw_expert_load(load, usage, self.step)
        figures.draw_neuron_use(use, usage, self.config.model.active_neurons, self.step)
        self.writer.write_figure(self.step, "expert_load", load)
        self.writer.write_figure(self.step, "neuron_use", use)
        self.writer.write_histograms(
            self.step,
            {f"neuron/selected/layer_{layer:02d}": selected for layer, selected in enumerate(usage.selected_LEH)}
            | {f"neuron/gate_magnitude/layer_{layer:02d}": size for layer, size in enumerate(usage.magnitude_LEH)},
        )

    def _draw_losses(self) -> None:
        assert self.writer is not None
        path = self.folder / "figures/loss.png"
        figures.draw_losses(path, read_metrics(self.folder), self.data.unigram_entropy)
        self.writer.write_figure(self.step, "loss", path)

    def _say(self, text: str) -> None:
        if self.runtime.is_main:
            print(text, flush=True)


def stop_if_diverged(step: int, result: StepResult) -> None:
    """FloatingPointError for a loss or gradient that is not finite, the same on every rank: nothing of it is saved."""
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise FloatingPointError(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}; the run stops here and its last checkpoint "
            "is from before. Try a lower optimizer.lr or a longer optimizer.warmup_steps"
        )


def check_agreed(checkpoint: Checkpoint | None, device: torch.device) -> None:
    """RuntimeError unless every rank found the same checkpoint; a collective on every rank."""
    step = -1 if checkpoint is None else checkpoint.step
    bounds = torch.tensor([step, -step], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    newest, oldest = bounds[0].item(), -bounds[1].item()
    if newest != oldest:
        raise RuntimeError(
            f"run.dir: rank {dist.get_rank()} sees a checkpoint of step {step}, others of steps {oldest} to {newest} "
            "(-1: none); run.dir must be on a file system that all nodes share"
        )


def auxiliary_loss_names(config: RunConfig) -> list[str]:
    """The auxiliary losses that this config computes, by the names they are recorded under."""
    model = config.model
    coefficients = {
        "load_balancing_loss": model.aux_loss_coeff,
        "seq_load_balancing_loss": model.seq_aux_loss_coeff,
        "global_load_balancing_loss": model.global_aux_loss_coeff,
        "z_loss": model.z_loss_coeff,
        "neuron_balance_loss": model.neuron_balance_coeff,
    }
    return [name for name, coefficient in coefficients.items() if coefficient > 0]
