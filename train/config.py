"""The configuration of a run.

config = load_config(hydra_config)        # typed, each field checked
validate(config, world_size)              # train.config_rules: rules that span sections
"""

from dataclasses import dataclass, field, replace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from mone_common.checks import check
from mone_common.console import to_dataclass
from mone_model.accounting import (
    Memory,
    equal_active_width,
    equal_flops_width,
    equal_total_experts,
    equal_total_width,
    estimate_memory,
)
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig
from train.config_init import InitConfig
from train.config_sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    ExecutionConfig,
    GuardConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainingConfig,
)


@dataclass
class RunConfig:
    """All options of a run."""

    run: ExecutionConfig = field(default_factory=ExecutionConfig)
    engine: str = "megatron"
    """Training engine: megatron (Megatron-Core's optimizers) or deepspeed (ZeRO)."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in run.dir, if any; never: refuse a run.dir that holds a run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check(self.engine in ("megatron", "deepspeed"), "engine", self.engine, "choose megatron or deepspeed")
        check(self.resume in ("auto", "never"), "resume", self.resume, "choose auto or never")
        if self.optimizer.warmup_steps is None:
            self.optimizer.warmup_steps = min(100, (self.optimizer.decay_steps or self.training.steps) // 10)
        option = "run.seed" if self.data.seed is None else "data.seed"
        check(self.data_seed < 2**31, option, self.data_seed, "it decides the order of samples and must be below 2**31")

    @property
    def data_seed(self) -> int:
        """Seed of the order of training samples."""
        return self.run.seed if self.data.seed is None else self.data.seed

    def data_parallel_size(self, world_size: int) -> int:
        """Number of data-parallel replicas, which read different sequences."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline * self.parallel.context)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches per optimizer step on each rank."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size(world_size))

    def estimate_memory(self, world_size: int, *, fused: bool) -> Memory:
        """Estimated bytes on the rank that needs most; fused: with Transformer Engine's layers."""
        zero = self.engine == "deepspeed"
        shares = self.deepspeed.zero_stage > 0 if zero else self.parallel.distributed_optimizer
        return estimate_memory(
            self.model,
            replace(self.parallel, distributed_optimizer=shares),
            self.compute,
            micro_batch_size=self.training.micro_batch_size,
            data_parallel_size=self.data_parallel_size(world_size),
            micro_batches=self.micro_batches(world_size),
            fused=fused,
        )


ConfigStore.instance().store(name="run_config", node=RunConfig)
# For experiments: moe_ffn_hidden_size: ${equal_active_width:160,${model.activation_ratio}}
for _resolver in (equal_active_width, equal_flops_width, equal_total_experts, equal_total_width):
    OmegaConf.register_new_resolver(_resolver.__name__, _resolver, replace=True)


def load_config(config: DictConfig) -> RunConfig:
    """Convert Hydra's config to dataclasses; ValueError for an invalid or missing field."""
    return to_dataclass(config, RunConfig)


def describe(config: RunConfig) -> dict[str, Any]:
    """The run's config as plain containers, for files and W&B."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
