"""Uses of private DeepSpeed APIs, which are needed for experts that are not DeepSpeed's own layers.

For deepspeed 0.19.8.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import groups
from megatron.core import parallel_state

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(deepspeed.DeepSpeedEngine):
    """DeepSpeed's engine for a model with experts but without DeepSpeed's MoE layers."""

    def _configure_distributed_model(self, model: Any) -> None:
        super()._configure_distributed_model(model)
        self.has_moe_layers, self.num_experts = True, [model.config.num_moe_experts]

    def _validate_zero3_moe_compatibility(self) -> None:
        """Skip the check, which accepts only DeepSpeed's own MoE layers."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """NotImplementedError, since DeepSpeed would save only the experts of one rank. Use `sharded_state`."""
        raise NotImplementedError("save DeepSpeedEngine.sharded_state()")


def start(module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Engine:
    """DeepSpeed's engine for the model, on the existing process groups; compiles nothing."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed requires it, also without a launcher. It must remain set, because ZeRO 3 reads it again in training steps.
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        # DeepSpeed would compile it at every start; it is not needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False)
    return Engine(args=None, model=module, optimizer=optimizer, config=config, config_class=DeepSpeedConfig(config))


def register_expert_groups(parameters: Any, stage: int) -> str:
    """Register the expert-parallel and expert-data-parallel groups, and mark the experts' weights; return the name."""
    others = parallel_state.get_expert_tensor_and_model_parallel_group()
    same = parallel_state.get_expert_data_parallel_group()
    name = f"ep_size_{others.size()}"  # DeepSpeed parses the number
    for registry, value in (
        (groups._EXPERT_PARALLEL_GROUP, others),
        (groups._EXPERT_DATA_PARALLEL_GROUP, same),
        (groups._EXPERT_PARALLEL_GROUP_RANKS, dist.get_process_group_ranks(others)),
        (groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, dist.get_process_group_ranks(same)),
    ):
        registry.clear()
        registry[name] = value
    for parameter in parameters:
        if not getattr(parameter, "allreduce", True):
            parameter.group_name = name
            if stage == 3:
                parameter.ds_zero_placement_family = "autoep_expert"
                parameter.ds_zero_partition_group_name = name
                parameter.ds_zero_partition_process_group = same
    return name


def create_moments(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    """Create the moments before the first step, for loading a checkpoint and for a first step that is dropped.

    DeepSpeed links weights to moments after the step of its first parameter group, when the other moments do not exist.
    """
    zero = engine.optimizer
    partitions = getattr(zero, "fp32_partitioned_groups_flat", None)
    if partitions is None:
        partitions = [partition for group in optimizer.param_groups for partition in group["params"]]
    for partition in partitions:
        moments = {kind: torch.zeros_like(partition) for kind in MOMENTS}
        optimizer.state[partition] = {"step": torch.tensor(0.0), **moments}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


@contextlib.contextmanager
def whole_parameters(parameters: dict[str, torch.nn.Parameter], stage: int) -> Iterator[None]:
    """Context in which every parameter has its whole data; with ZeRO 3 a copy that is freed at the end."""
    with deepspeed.zero.GatheredParameters(list(parameters.values()), enabled=stage == 3):
        yield


def refresh_partitions(zero: Any) -> None:
    """Copy ZeRO 3's fp32 master partitions to the partitions of the weights."""
    zero.checkpoint_event_prologue()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    zero.checkpoint_event_epilogue()


def global_norm(engine: Engine) -> float:
    """Norm of the last gradient with ZeRO, before clipping; inf if it was not finite."""
    return float(engine.optimizer._global_grad_norm)
