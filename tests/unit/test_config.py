"""Invalid options are refused; the error names the option, its value and a way out."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, RatioPoint, top_k
from mone_model.megatron.transformer_config import transformer_config
from tests.tiny import TINY_MODEL
from train.config import RunConfig, describe, load_config
from train.config_rules import validate
from train.config_sections import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    ExecutionConfig,
    GuardConfig,
    LoggingConfig,
    OptimizerConfig,
    SourceConfig,
    TrainingConfig,
)
from train.description import describe_run


def scheduled(*points: tuple[int, float | None], **options: Any) -> ModelConfig:
    return ModelConfig(activation_ratio_schedule=[RatioPoint(*point) for point in points], **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(hidden_size=100), ["model.hidden_size=100", "multiple of 8", "96"]),
        (lambda: ModelConfig(router_topk=9), ["model.router_topk=9", "num_experts=8"]),
        (lambda: ModelConfig(num_attention_heads=5), ["model.num_attention_heads=5", "hidden_size=256"]),
        (lambda: ModelConfig(num_query_groups=3), ["model.num_query_groups=3"]),
        (lambda: ModelConfig(activation_ratio=0), ["model.activation_ratio=0", "(0, 1]"]),
        (lambda: ModelConfig(activation_ratio=1.5), ["model.activation_ratio=1.5"]),
        (lambda: ModelConfig(layer_activation_ratios=[0.25]), ["model.layer_activation_ratios=[0.25]", "num_layers=4"]),
        (lambda: ModelConfig(layer_activation_ratios=[0.5, 0, 0.25, 0.25]), ["model.layer_activation_ratios=", "(0, 1]"]),
        (
            lambda: ModelConfig(layer_activation_ratios=[0.5, 0.25, 0.5, 0.25]),
            ["model.activation_ratio=0.25", "0.375"],
        ),
        (
            lambda: ModelConfig(activation_ratio=1, layer_activation_ratios=[0.999, 1, 1, 1]),
            ["activation_ratio=1", "below 1"],
        ),
        (lambda: ModelConfig(activation_ratio_curve="sine"), ["model.activation_ratio_curve=sine", "cosine"]),
        (lambda: scheduled((0, 1.0), (9, 0.5)), ["model.activation_ratio_schedule=1 at step 0, 0.5 at step 9", "0.25"]),
        (lambda: scheduled((0, 1.5), (9, 0.25)), ["model.activation_ratio_schedule=1.5 at step 0", "(0, 1]"]),
        (lambda: scheduled((5, 1.0), (5, 0.25)), ["model.activation_ratio_schedule=", "the steps must rise"]),
        (lambda: scheduled((-1, 1.0), (5, 0.25)), ["model.activation_ratio_schedule=", "from 0 on"]),
        (
            lambda: scheduled((0, 0.125), (9, 0.25), layer_activation_ratios=[0.5, 0.25, 0.125, 0.125]),
            ["model.activation_ratio_schedule=0.125 at step 0", "model.layer_activation_ratios", "at least"],
        ),
        (lambda: ModelConfig(activation="swish"), ["model.activation=swish", "silu"]),
        (lambda: ModelConfig(neuron_balance_form="none"), ["model.neuron_balance_form=none", "normalised"]),
        (lambda: ModelConfig(expert_bias=True), ["model.expert_bias=True", "router_score_function=sigmoid"]),
        (lambda: ModelConfig(router_topk=1), ["model.router_topk=1", "router_pre_softmax=true"]),
        (lambda: ModelConfig(z_loss_coeff=-1), ["model.z_loss_coeff=-1"]),
        (lambda: ModelConfig().padded_vocab_size, ["model.vocab_size=null"]),
        (lambda: ComputeConfig(precision="fp16"), ["compute.precision=fp16", "bf16"]),
        (lambda: ComputeConfig(recompute_modules=["mlp"]), ["compute.recompute_modules=", "core_attn"]),
        (lambda: ParallelConfig(expert=0), ["parallel.expert=0"]),
        (lambda: OptimizerConfig(schedule="cos"), ["optimizer.schedule=cos", "wsd"]),
        (lambda: OptimizerConfig(lr=1e-4, min_lr=1e-3), ["optimizer.min_lr=0.001", "optimizer.lr=0.0001"]),
        (lambda: LoggingConfig(wandb_mode="off"), ["logging.wandb_mode=off", "offline"]),
        (lambda: RunConfig(resume="yes"), ["resume=yes", "auto"]),
        (lambda: ModelConfig(num_query_groups=0), ["model.num_query_groups=0"]),
        (lambda: ModelConfig(kv_channels=0), ["model.kv_channels=0"]),
        (lambda: ModelConfig(expert_capacity_factor=-1), ["model.expert_capacity_factor=-1"]),
        (lambda: ModelConfig(init_std=-1), ["model.init_std=-1"]),
        (lambda: OptimizerConfig(beta1=1.5), ["optimizer.beta1=1.5"]),
        (lambda: OptimizerConfig(weight_decay=-0.1), ["optimizer.weight_decay=-0.1"]),
        (lambda: TrainingConfig(steps=0), ["training.steps=0"]),
        (lambda: TrainingConfig(micro_batch_size=0), ["training.micro_batch_size=0"]),
        (lambda: EvaluationConfig(sequences=0), ["evaluation.sequences=0"]),
        (lambda: LoggingConfig(neuron_interval=-4), ["logging.neuron_interval=-4"]),
        (lambda: LoggingConfig(wandb_project="a/b"), ["logging.wandb_project='a/b'", "/ \\ # ? % :"]),
        (lambda: LoggingConfig(wandb_project=""), ["logging.wandb_project=''", "must not be empty"]),
        (lambda: LoggingConfig(wandb_project="a" * 129), ["logging.wandb_project='a", "129 characters"]),
        (lambda: LoggingConfig(wandb_entity="my team?"), ["logging.wandb_entity='my team?'"]),
        (lambda: LoggingConfig(wandb_entity=" "), ["logging.wandb_entity=' '", "must not be empty"]),
        (lambda: LoggingConfig(wandb_group="a" * 129), ["logging.wandb_group='a", "129 characters"]),
        (lambda: LoggingConfig(wandb_group="a\nb"), ["logging.wandb_group=", "control characters"]),
        (lambda: CheckpointConfig(keep_last=0), ["checkpoint.keep_last=0"]),
        (lambda: DataConfig(num_workers=-1), ["data.num_workers=-1"]),
        (lambda: DataConfig(blend=[SourceConfig()]), ["data.blend", "needs a path"]),
        (lambda: DataConfig(blend=[SourceConfig(path="b", weight=-1.0)]), ["weight of b=-1.0"]),
        (lambda: ExecutionConfig(timeout_minutes=0), ["run.timeout_minutes=0"]),
        (lambda: ExecutionConfig(time_limit="24h"), ["run.time_limit=24h", "HH:MM:SS"]),
        (lambda: GuardConfig(spike_sigma=0), ["guard.spike_sigma=0"]),
        (lambda: CheckpointConfig(keep_every=0), ["checkpoint.keep_every=0"]),
        (lambda: DeepSpeedConfig(zero_stage=4), ["deepspeed.zero_stage=4"]),
        (lambda: DeepSpeedConfig(zero_stage=0, offload_optimizer=True), ["deepspeed.offload_optimizer=True"]),
        (lambda: RunConfig(engine="fsdp"), ["engine=fsdp", "deepspeed"]),
    ],
)
def test_a_field_checks_itself(make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        make()
    for word in words:
        assert word in str(error.value)


def run_config(**sections: Any) -> RunConfig:
    config = RunConfig(**sections)
    config.model.vocab_size = 64
    config.data.blend = config.data.blend or [SourceConfig(path="x")]
    return config


@pytest.mark.parametrize(
    ("sections", "world_size", "words"),
    [
        (
            {"parallel": ParallelConfig(expert=2)},
            1,
            ["expert 2", "number of processes, 1; start 2 (torchrun --nproc-per-node)"],
        ),
        (
            {"parallel": ParallelConfig(tensor=2)},
            3,
            ["tensor 2 x pipeline 1 x context 1 = 2", "3 = data x 2", "start 2 or 4"],
        ),
        (
            {
                "parallel": ParallelConfig(pipeline=2, virtual_pipeline=2),
                "training": TrainingConfig(micro_batch_size=4, global_batch_size=12),
            },
            2,
            ["parallel.virtual_pipeline=2", "12 / (4 a pass) = 3", "nearest training.global_batch_size: 8 or 16"],
        ),
        ({"parallel": ParallelConfig(pipeline=2, virtual_pipeline=4)}, 2, ["= 8", "num_layers=4", "nearest: 2, 4"]),
        ({"parallel": ParallelConfig(pipeline=2), "engine": "deepspeed"}, 2, ["parallel.pipeline=2", "engine=deepspeed"]),
        (
            {"deepspeed": DeepSpeedConfig(zero_stage=0), "compute": ComputeConfig(precision="bf16"), "engine": "deepspeed"},
            1,
            ["deepspeed.zero_stage=0", "bf16"],
        ),
        (
            {"deepspeed": DeepSpeedConfig(options={"gradient_clipping": 2}), "engine": "deepspeed"},
            1,
            ["deepspeed.options=gradient_clipping"],
        ),
        (
            {"deepspeed": DeepSpeedConfig(options={"zero_optimization": {"stage": 3}}), "engine": "deepspeed"},
            1,
            ["deepspeed.options=zero_optimization.stage"],
        ),
        ({"parallel": ParallelConfig(expert=3)}, 3, ["parallel.expert=3", "model.num_experts=8", "nearest: 2, 4"]),
        ({"parallel": ParallelConfig(expert_tensor=3)}, 3, ["parallel.expert_tensor=3", "moe_ffn_hidden_size=512"]),
        ({"parallel": ParallelConfig(expert_tensor=128)}, 128, ["parallel.expert_tensor=128", "4 neurons a rank"]),
        ({"parallel": ParallelConfig(tensor=8)}, 8, ["parallel.tensor=8", "num_attention_heads=4"]),
        ({"parallel": ParallelConfig(pipeline=3)}, 3, ["parallel.pipeline=3", "num_layers=4"]),
        # Proposals satisfy all other rules: 6 divides the heads, but not the length; 12 processes do not divide the batch.
        (
            {"parallel": ParallelConfig(tensor=5), "model": ModelConfig(hidden_size=240, num_attention_heads=12)},
            5,
            ["parallel.tensor=5", "num_attention_heads=12", "nearest: 2, 4"],
        ),
        (
            {"parallel": ParallelConfig(tensor=8), "model": ModelConfig(num_attention_heads=8, num_query_groups=4)},
            8,
            ["parallel.tensor=8", "num_query_groups=4", "nearest: 2, 4"],
        ),
        (
            {"parallel": ParallelConfig(tensor=4), "training": TrainingConfig(global_batch_size=32)},
            10,
            ["10 = data x 4; start 8 or 16 (torchrun --nproc-per-node)"],
        ),
        ({"parallel": ParallelConfig(virtual_pipeline=2)}, 1, ["parallel.virtual_pipeline=2", "at least 2"]),
        ({"parallel": ParallelConfig(context=2)}, 2, ["parallel.context=2", "GPUs"]),
        ({"training": TrainingConfig(global_batch_size=6)}, 1, ["global_batch_size=6", "micro_batch_size=4", "= 4"]),
        ({"training": TrainingConfig(global_batch_size=4)}, 2, ["global_batch_size=4", "data-parallel size=2", "8"]),
        (
            {"training": TrainingConfig(steps=50), "optimizer": OptimizerConfig(warmup_steps=100)},
            1,
            ["optimizer.warmup_steps=100", "50", "null"],
        ),
        ({"logging": LoggingConfig(neuron_interval=30)}, 1, ["logging.figure_interval=200", "neuron_interval=30"]),
        (
            {"optimizer": OptimizerConfig(schedule="wsd", wsd_decay_steps=950)},
            1,
            ["optimizer.wsd_decay_steps=950", "warmup_steps=100", "1000 steps"],
        ),
        (
            {"compute": ComputeConfig(transformer_impl="transformer_engine")},
            1,
            ["compute.transformer_impl=transformer_engine", "local"],
        ),
        (
            {"compute": ComputeConfig(recompute="selective", recompute_modules=["layernorm"])},
            1,
            ["compute.recompute_modules=['layernorm']", "Transformer Engine"],
        ),
    ],
)
def test_rules_that_span_sections(sections: dict[str, Any], world_size: int, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        validate(run_config(**sections), world_size)
    for word in words:
        assert word in str(error.value)


def test_the_blend_needs_all_weights_or_none() -> None:
    config = run_config()
    config.data.blend = [SourceConfig(path="a", weight=1.0), SourceConfig(path="b")]
    with pytest.raises(ValueError, match="every source a weight, or none"):
        validate(config, 1)


def test_valid_logging_options_pass() -> None:
    validate(run_config(logging=LoggingConfig(neuron_interval=0)), 1)
    LoggingConfig(wandb_group=r"a/b: $\x$", wandb_project="mone, neurons")
    LoggingConfig(wandb_mode="disabled", wandb_project="a/b")


def test_the_printed_memory_includes_the_process() -> None:
    config = run_config()
    text = describe_run(config, 1)
    model, resident, both = (
        float(re.search(pattern, text)[1])  # type: ignore[index]
        for pattern in (r"about (\S+) GiB a rank for the model", r"and (\S+) GiB for Python", r"about (\S+) GiB of memory")
    )
    assert resident > 0.1
    assert abs(model + resident - both) < 0.02


def test_valid_layouts_pass() -> None:
    for parallel, world_size in [
        (ParallelConfig(), 1),
        (ParallelConfig(expert=2), 2),
        (ParallelConfig(expert=4, expert_tensor=2, tensor=2), 8),
        (ParallelConfig(pipeline=2, virtual_pipeline=2, tensor=2), 4),
    ]:
        validate(run_config(parallel=parallel), world_size)


@pytest.mark.parametrize("world_size", [1, 8])
def test_more_processes_are_not_proposed_for_a_degree_that_does_not_fit_the_model(world_size: int) -> None:
    with pytest.raises(ValueError, match="must divide the number of processes") as error:
        validate(run_config(parallel=ParallelConfig(tensor=3)), world_size)
    assert "parallel.tensor=3: must divide model.num_attention_heads=4; nearest: " in str(error.value)
    assert "start" not in str(error.value)


@pytest.mark.parametrize(
    ("training", "optimizer", "warmup"),
    [
        (TrainingConfig(steps=140), OptimizerConfig(), 14),
        (TrainingConfig(steps=5), OptimizerConfig(), 0),
        (TrainingConfig(steps=5000), OptimizerConfig(), 100),
        (TrainingConfig(steps=5000), OptimizerConfig(decay_steps=300), 30),
        (TrainingConfig(steps=140), OptimizerConfig(warmup_steps=100), 100),
    ],
)
def test_warm_up_fits_short_runs(training: TrainingConfig, optimizer: OptimizerConfig, warmup: int) -> None:
    config = run_config(training=training, optimizer=optimizer)
    validate(config, 1)
    assert config.optimizer.warmup_steps == warmup
    assert describe(config)["optimizer"]["warmup_steps"] == warmup


NOT_NAMES = (
    "",
    " ",
    ".",
    "..",
    "../../x",
    "a/../b",
    "/tmp/x",
    "a//b",
    "a/",
    "-x",
    "a/-x",
    "a\nb",
    "a\0b",
    "a\x1b[2J",
    "é" * 128,
)


@pytest.mark.parametrize("name", NOT_NAMES)
def test_invalid_run_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^run\.name=.*names a folder below runs/") as error:
        ExecutionConfig(name=name)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["mone", "k_sweep/activation_ratio=0.5,seed=1", "it's a name", "über", "a..b", "x" * 255])
def test_valid_run_names_are_accepted(name: str) -> None:
    assert ExecutionConfig(name=name).name == name


@pytest.mark.parametrize("folder", ["", " ", "runs/a\nb", "runs/a\0b", "runs/\x7f"])
def test_a_run_folder_is_a_printable_path(folder: str) -> None:
    with pytest.raises(ValueError, match=r"^run\.dir=.*must be the path of a folder"):
        ExecutionConfig(dir=folder)


@pytest.mark.parametrize(
    ("parallel", "capacity", "dispatcher"),
    [
        (ParallelConfig(), None, "allgather"),
        (ParallelConfig(expert=2), None, "alltoall"),
        (ParallelConfig(expert_tensor=2), None, "alltoall"),
        (ParallelConfig(), 1.0, "alltoall"),
    ],
)
def test_rows_are_sent_only_to_ranks_with_other_experts(
    parallel: ParallelConfig, capacity: float | None, dispatcher: str
) -> None:
    model = ModelConfig(**TINY_MODEL, expert_capacity_factor=capacity)
    config = transformer_config(model, parallel, ComputeConfig())
    assert config.moe_token_dispatcher_type == dispatcher


def test_a_described_config_loads_again() -> None:
    from omegaconf import OmegaConf

    config = run_config(parallel=ParallelConfig(expert=2))
    again = load_config(OmegaConf.merge(OmegaConf.structured(RunConfig), describe(config)))  # type: ignore[arg-type]
    assert describe(again) == describe(config)


@pytest.mark.parametrize(("ratio", "neurons", "k"), [(1, 512, 512), (0.25, 512, 128), (0.5, 5, 3), (0.001, 8, 1)])
def test_top_k_rounds_halves_up(ratio: float, neurons: int, k: int) -> None:
    assert top_k(ratio, neurons) == k


@pytest.mark.parametrize(
    ("limit", "seconds"), [("00:10:00", 600), ("24:00:00", 86400), ("1-02:00:30", 93630), (None, float("inf"))]
)
def test_time_limits_are_written_as_slurm_does(limit: str | None, seconds: float) -> None:
    assert ExecutionConfig(time_limit=limit).time_limit_seconds == seconds


def test_a_run_that_ends_before_the_schedule_of_the_ratio_says_so() -> None:
    model = scheduled((0, 1.0), (900, None), vocab_size=64)
    config = RunConfig(model=model, training=TrainingConfig(steps=500))
    warning = "warning: training.steps=500 ends before model.activation_ratio_schedule, whose last step is 900"
    assert warning in describe_run(config, 1)
    config.training.steps = 900
    assert "warning" not in describe_run(config, 1)
