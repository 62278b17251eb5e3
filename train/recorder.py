"""Record losses, speed, memory, expert load, neuron use and figures. docs/metrics.md lists the names.

    recorder = Recorder(config, runtime, engine.modules, resume_step=200, samples=3200, wandb_id=None)
    recorder.begin_step()
    recorder.record_step(step, samples, result, dropped=0)
    recorder.record_neurons(step, samples, draw=True)
    recorder.close(step, unigram_entropy)

The record_* methods are collectives on every rank; the main rank writes. Errors in writing and drawing do not end the run.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mone_common.run_records import read_metrics
from mone_model.accounting import count_flops
from mone_model.loss_record import LossRecord, reduce_losses
from mone_model.megatron.gpt import moe_layers
from mone_model.neuron_stats import NeuronUsage, reduce_counters, summarise_experts, summarise_neurons
from train.config import RunConfig
from train.engines.base import StepResult
from train.metrics import MetricsWriter, format_line
from train.runtime import Runtime


class Recorder:
    """Reduces the counters of the modules and passes the results to the MetricsWriter of the main rank."""

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        modules: Iterable[torch.nn.Module],
        *,
        resume_step: int,
        samples: int,
        wandb_id: str | None,
    ) -> None:
        self.config, self.runtime, self.folder = config, runtime, Path(config.run.dir)
        self.layers = [layer for module in modules for layer in moe_layers(module)]
        self.writer = (
            MetricsWriter(config, self.folder, resume_step=resume_step, wandb_id=wandb_id) if runtime.is_main else None
        )
        self.steps_timed, self.seconds = 0, 0.0
        self.counted_from = samples
        self._count_neurons()

    def say(self, text: str) -> None:
        """Print text on the main rank."""
        if self.runtime.is_main:
            print(text, flush=True)

    def wandb_id(self) -> str | None:
        """Id of the W&B run, on every rank."""
        found = [self.writer.wandb_id if self.writer is not None else None]
        dist.broadcast_object_list(found)
        return found[0]

    def begin_step(self) -> None:
        """Reset the auxiliary losses, so that a record has those of one step."""
        for records in self._records_by_layer().values():
            for record in records:
                record.reset()

    def end_step(self, seconds: float) -> None:
        """Add the duration of a step."""
        self.steps_timed, self.seconds = self.steps_timed + 1, self.seconds + seconds

    def record_step(self, step: int, samples: int, result: StepResult, *, dropped: int) -> None:
        """Write losses, speed and memory of this step. samples, dropped: counts since the start of the run."""
        names, model = auxiliary_loss_names(self.config), self.config.model
        losses = reduce_losses(self._records_by_layer(), names=names, num_layers=model.num_layers)
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
            "train/tokens": float(samples * self.config.model.seq_length),
            "train/dropped_steps": float(dropped),
            **({"train/activation_ratio": model.at_step(step).activation_ratio} if model.activation_ratio_schedule else {}),
            "speed/tokens_per_second": tokens_a_second,
            "speed/flops_per_second": 3 * count_flops(self.config.model).dense * tokens_a_second,
            "memory/peak_gib": memory,
        }
        with self._printing_errors("record"):
            self.writer.write(step, values)
            eta = (self.config.training.steps - step) * seconds_a_step
            self.say(format_line(step, self.config.training.steps, values, eta))

    def record_neurons(self, step: int, samples: int, *, draw: bool) -> None:
        """Write expert load and neuron statistics since the last such record; if `draw`, also figures."""
        model = self.config.model.at_step(step)
        usage = reduce_counters(
            {layer: experts.counters for layer, experts, _ in self.layers if experts.counters is not None},
            num_layers=model.num_layers,
            num_experts=model.num_experts,
            num_neurons=model.moe_ffn_hidden_size,
            expert_rank=parallel_state.get_expert_model_parallel_rank(),
            expert_tensor_rank=parallel_state.get_expert_tensor_parallel_rank(),
        )
        self._count_neurons()
        routed = (samples - self.counted_from) * model.seq_length * model.router_topk
        self.counted_from = samples
        if self.writer is None:
            return
        with self._printing_errors("record"):
            summary = {f"expert/{name}": values for name, values in summarise_experts(usage).items()}
            summary["expert/dropped"] = 1 - usage.tokens_LE.sum(-1) / routed
            summary |= {
                f"neuron/{name}": values for name, values in summarise_neurons(usage, model.active_neurons_by_layer).items()
            }
            by_layer = {
                f"{name}/layer_{layer:02d}": value
                for name, values in summary.items()
                for layer, value in enumerate(values.tolist())
            }
            self.writer.write(step, {name: values.mean().item() for name, values in summary.items()} | by_layer)
        if draw:
            self._draw_usage(step, usage)

    def record_validation(self, step: int, losses: dict[str, float]) -> float | None:
        """Write the validation loss of each source and the mean; return the mean."""
        if not losses:
            return None
        mean = sum(losses.values()) / len(losses)
        by_source = {f"validation/loss/{name}": loss for name, loss in losses.items()}
        self.record(step, {"validation/loss": mean} | by_source)
        parts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self.say(f"step {step}: validation loss {mean:.4f} ({parts})")
        return mean

    def record(self, step: int, values: dict[str, float]) -> None:
        """Write a record."""
        if self.writer is not None:
            with self._printing_errors("record"):
                self.writer.write(step, values)

    def close(self, step: int, unigram_entropy: float) -> None:
        """Draw the losses and close the files."""
        if self.writer is None:
            return
        path = self.folder / "figures/loss.png"
        with self._printing_errors("figure"):
            from train import figures  # takes half a second, and only the main rank needs it

            figures.draw_losses(path, read_metrics(self.folder), unigram_entropy)
            self.writer.write_figure(step, "loss", path)
        with self._printing_errors("last record"):
            self.writer.close()

    @contextlib.contextmanager
    def _printing_errors(self, what: str) -> Iterator[None]:
        """Print an exception of the block and continue.

        A failure to write or draw must not end training. Only the main rank writes, and the others would wait for it.
        """
        try:
            yield
        except Exception as error:
            self.say(f"no {what}: {type(error).__name__}: {error}")

    def _records_by_layer(self) -> dict[int, list[LossRecord]]:
        return {layer: [experts.record, router.record] for layer, experts, router in self.layers}

    def _count_neurons(self) -> None:
        for _, experts, _ in self.layers:
            experts.counting_neurons = self.config.logging.neuron_interval > 0
            if experts.counters is not None:
                experts.counters.reset()

    def _peak_memory_gib(self) -> float:
        """Highest peak over all ranks: device memory on GPUs, resident memory of the process on CPUs."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak_tensor = torch.tensor(peak, dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(peak_tensor, op=dist.ReduceOp.MAX)
        return peak_tensor.item() / 2**30

    def _draw_usage(self, step: int, usage: NeuronUsage) -> None:
        assert self.writer is not None
        load, use = self.folder / "figures/expert_load.png", self.folder / "figures/neuron_use.png"
        with self._printing_errors("figure"):
            from train import figures

            figures.draw_expert_load(load, usage, step)
            figures.draw_neuron_use(use, usage, self.config.model.at_step(step).active_neurons_by_layer, step)
            self.writer.write_figure(step, "expert_load", load)
            self.writer.write_figure(step, "neuron_use", use)
        with self._printing_errors("histogram"):
            self.writer.write_histograms(
                step,
                {f"neuron/selected/layer_{layer:02d}": selected for layer, selected in enumerate(usage.selected_LEH)}
                | {f"neuron/gate_magnitude/layer_{layer:02d}": size for layer, size in enumerate(usage.magnitude_LEH)},
            )


def auxiliary_loss_names(config: RunConfig) -> list[str]:
    """Metric names of the auxiliary losses that this config enables."""
    model = config.model
    coefficients = {
        "load_balancing_loss": model.aux_loss_coeff,
        "seq_load_balancing_loss": model.seq_aux_loss_coeff,
        "global_load_balancing_loss": model.global_aux_loss_coeff,
        "z_loss": model.z_loss_coeff,
        "neuron_balance_loss": model.neuron_balance_coeff,
    }
    return [name for name, coefficient in coefficients.items() if coefficient > 0]
