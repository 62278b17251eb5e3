"""The DeepSpeed configuration of a run, and the options that the DeepSpeed engine refuses."""

from typing import Any

from mone_common.checks import check
from train.config import RunConfig

# Keys that other sections of the config set, or that this engine does not support.
RESERVED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "managed_gradient_accumulation"),
    *("gradient_clipping", "optimizer", "scheduler", "fp16", "bf16", "torch_autocast", "data_types"),
    *("tensor_parallel", "sequence_parallel_size", "expert_parallel", "hybrid_engine", "prescale_gradients"),
)
RESERVED_ZERO = ("stage", "offload_optimizer.device", "contiguous_gradients", "reduce_scatter", "compute_grad_norm")


def check_config(config: RunConfig) -> None:
    """ValueError that names the option, for options that this engine does not support."""
    section, parallel = config.deepspeed, config.parallel
    for name in ("tensor", "pipeline", "context"):
        check(getattr(parallel, name) == 1, f"parallel.{name}", getattr(parallel, name), "engine=deepspeed needs 1")
    check(
        config.compute.precision == "fp32" or section.zero_stage > 0,
        "deepspeed.zero_stage",
        section.zero_stage,
        "compute.precision=bf16 needs at least 1, which keeps fp32 master weights",
    )
    for key in RESERVED:
        check(key not in section.options, "deepspeed.options", key, "is set by the other sections, or not supported")
    for path in RESERVED_ZERO:
        value: Any = section.options.get("zero_optimization", {})
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        check(value is None, "deepspeed.options", f"zero_optimization.{path}", "is set by deepspeed.* or not supported")


def deepspeed_config(config: RunConfig, micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's own configuration of this run."""
    section = config.deepspeed
    zero: dict[str, Any] = {
        "stage": section.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": config.parallel.overlap_communication,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
    }
    if section.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "steps_per_print": None,
        "zero_optimization": zero,
        # DeepSpeed's own optimizer is compiled at the start of a run and cannot skip a step.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.optimizer.clip_grad if section.zero_stage > 0 else 0.0,
    }
    if config.compute.precision == "bf16":
        ours |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    return _merge(ours, section.options)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged
