"""Text that a run prints at its start and end."""

from typing import TYPE_CHECKING

from mone_common.checkpoint_folder import list_checkpoints
from mone_model.accounting import count_flops, count_parameters
from mone_model.megatron.transformer_engine import uses_transformer_engine
from train.config import RunConfig

if TYPE_CHECKING:
    from train.loop import Trainer


def describe_run(config: RunConfig, world_size: int) -> str:
    """A summary of model, layout, memory and training in a few lines."""
    model, parallel, training = config.model, config.parallel, config.training
    parameters, flops = count_parameters(model), count_flops(model)
    tokens = training.steps * training.global_batch_size * model.seq_length
    memory = config.estimate_memory(world_size, fused=uses_transformer_engine(config.compute))
    return "\n".join(
        [
            f"model     {parameters.total / 1e6:.1f}M parameters, {parameters.active / 1e6:.1f}M active; "
            f"{model.num_experts} experts of {model.moe_ffn_hidden_size} neurons, top {model.router_topk}",
            f"neurons   activation_ratio {model.activation_ratio:g} (K = {model.describe_active_neurons()}), "
            f"active_expert_params {parameters.active_expert_params:.1%}, "
            f"active_moe_params {parameters.active_moe_params:.1%} with router and shared expert",
            *describe_ratios(config),
            f"layout    {world_size} processes: data {config.data_parallel_size(world_size)}, tensor {parallel.tensor}, "
            f"pipeline {parallel.pipeline}, expert {parallel.expert}, expert_tensor {parallel.expert_tensor}; "
            f"{config.micro_batches(world_size)} micro-batches a step; engine {config.engine}",
            f"memory    about {memory.total / 2**30:.2f} GiB a rank for the model: weights {memory.weights / 2**30:.2f}, "
            f"gradients {memory.gradients / 2**30:.2f}, optimizer {memory.optimizer / 2**30:.2f}, "
            f"activations {memory.activations / 2**30:.2f}, working space {memory.working / 2**30:.2f}",
            f"          {describe_process_memory(memory.total)}",
            f"training  {training.steps} steps of {training.global_batch_size} x {model.seq_length} tokens "
            f"= {tokens / 1e6:.2f}M tokens, {3 * tokens * flops.dense / 1e15:.3g} PFLOP; "
            f"{config.optimizer.warmup_steps} steps of warm-up",
        ]
    )


def describe_ratios(config: RunConfig) -> list[str]:
    """A line for the ratios of the layers, and one for the schedule, if there are any."""
    model, lines = config.model, []
    if model.layer_activation_ratios is not None:
        lines.append(f"          by layer {', '.join(f'{ratio:g}' for ratio in model.layer_activation_ratios)}")
    if model.activation_ratio_schedule:
        steps = [point.step for point in model.activation_ratio_schedule]
        ratios = ", ".join(f"{model.at_step(step).activation_ratio:g} at step {step}" for step in steps)
        lines.append(f"          in training {ratios} ({model.activation_ratio_curve})")
        if steps[-1] > config.training.steps:
            lines.append(
                f"warning: training.steps={config.training.steps} ends before model.activation_ratio_schedule, whose last "
                f"step is {steps[-1]}"
            )
    return lines


def describe_process_memory(model: float) -> str:
    """The memory that the estimate does not include, for comparison with `memory/peak_gib`; model: the estimate in bytes."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return "of device memory; CUDA and NCCL need more"
    resident = psutil.Process().memory_info().rss
    return (
        f"and {resident / 2**30:.2f} GiB for Python and loaded libraries: about "
        f"{(model + resident) / 2**30:.2f} GiB of memory; W&B, figures and saves need more"
    )


def describe_end(trainer: "Trainer", complete: bool) -> str:
    """The result of the run and the location of its files."""
    lines = []
    if trainer.validated is not None:
        step, loss = trainer.validated
        lines.append(
            f"validation loss {loss:.3f} nats per token at step {step}; "
            f"token frequencies alone give {trainer.data.unigram_entropy:.3f}"
        )
    folder = trainer.checkpoints.parent
    figures = ", ".join(sorted(path.name for path in (folder / "figures").glob("*.png")))
    wandb = f"; {folder}/wandb/ the same for W&B (upload with `wandb sync`)" if (folder / "wandb").is_dir() else ""
    lines += [
        "complete" if complete else f"stopped at step {trainer.step}; the same command continues the run",
        *([f"  {folder}/figures/        {figures}"] if figures else []),
        f"  {folder}/metrics.jsonl   all records{wandb}",
        f"  {folder}/checkpoints/    {', '.join(found.path.name for found in list_checkpoints(trainer.checkpoints)[0])}",
        f"  {folder}/config.yaml     the composed configuration; environment.json versions and machine",
    ]
    return "\n".join(lines)
