"""Every rule that spans sections of the configuration or needs the world size.

validate(config, world_size)              # before anything is built
"""

import math

from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, check
from mone_model.expert_methods import check_skip, why_not_skip
from train.config import RunConfig


def validate(config: RunConfig, world_size: int, *, transformer_engine: bool | None = None) -> None:
    """Check every rule that spans sections or needs the world size; ValueError names options, values and a way out.

    transformer_engine: whether the layers will be Transformer Engine's; None: if they would be on this machine.
    """
    from mone_model.layer_spec import uses_transformer_engine

    model, parallel, training = config.model, config.parallel, config.training
    if transformer_engine is None:
        transformer_engine = uses_transformer_engine(config.compute)
    _validate_layout(model, parallel, config.compute, world_size, transformer_engine)
    if config.engine == "deepspeed":
        from train.engines.deepspeed_config import check_config

        check_config(config)

    data_parallel = config.data_parallel_size(world_size)
    per_pass = training.micro_batch_size * data_parallel
    check(
        training.global_batch_size >= per_pass and training.global_batch_size % per_pass == 0,
        "training.global_batch_size",
        training.global_batch_size,
        f"must be a multiple of training.micro_batch_size={training.micro_batch_size} x data-parallel size={data_parallel} "
        f"= {per_pass}; nearest: {max(1, round(training.global_batch_size / per_pass)) * per_pass}",
    )
    micro_batches = config.micro_batches(world_size)
    check(
        parallel.virtual_pipeline is None or micro_batches % parallel.pipeline == 0,
        "parallel.virtual_pipeline",
        parallel.virtual_pipeline,
        f"the interleaved schedule needs micro-batches (training.global_batch_size {training.global_batch_size} / "
        f"({per_pass} a pass) = {micro_batches}) divisible by parallel.pipeline={parallel.pipeline}; "
        f"nearest training.global_batch_size: {_multiples(training.global_batch_size, per_pass * parallel.pipeline)}",
    )
    optimizer = config.optimizer
    last = optimizer.decay_steps or training.steps
    check(
        optimizer.warmup_steps < last,
        "optimizer.warmup_steps",
        optimizer.warmup_steps,
        f"must be below the end of the decay, step {last}",
    )
    check(
        optimizer.schedule != "wsd" or optimizer.warmup_steps + (optimizer.wsd_decay_steps or 0) <= last,
        "optimizer.wsd_decay_steps",
        optimizer.wsd_decay_steps,
        f"with optimizer.warmup_steps={optimizer.warmup_steps} it is longer than the whole schedule of {last} steps",
    )
    weighted = [source.weight is not None for source in config.data.blend]
    check(all(weighted) or not any(weighted), "data.blend", config.data.blend, "give every source a weight, or none")
    logging = config.logging
    check(
        logging.neuron_interval == 0 or logging.figure_interval % logging.neuron_interval == 0,
        "logging.figure_interval",
        logging.figure_interval,
        f"must be a multiple of logging.neuron_interval={logging.neuron_interval}, or 0",
    )


def _divides(divisor: int, number: int, option: str, of: str) -> None:
    check(number % divisor == 0, option, divisor, f"must divide {of}={number}; nearest: {_divisors_near(divisor, number)}")


def _divisors_near(value: int, number: int) -> str:
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda divisor: abs(divisor - value))[:2])))


def _multiples(value: int, of: int) -> str:
    """The multiples next to a value."""
    below = value // of * of
    return f"{below} or {below + of}" if below else str(of)


def _validate_layout(
    model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, world_size: int, transformer_engine: bool
) -> None:
    dense = parallel.tensor * parallel.pipeline * parallel.context
    check(
        world_size % dense == 0,
        "parallel",
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {dense}",
        f"must divide the number of processes, {world_size} = data x {dense}; start {_multiples(world_size, dense)}",
    )
    sparse = parallel.expert * parallel.expert_tensor * parallel.pipeline
    starts = _multiples(world_size, math.lcm(sparse, dense))
    check(
        world_size % sparse == 0,
        "parallel",
        f"expert {parallel.expert} x expert_tensor {parallel.expert_tensor} x pipeline {parallel.pipeline} = {sparse}",
        f"must divide the number of processes, {world_size}; start {starts} (torchrun --nproc-per-node)",
    )
    _divides(parallel.expert, model.num_experts, "parallel.expert", "model.num_experts")
    _divides(parallel.expert_tensor, model.moe_ffn_hidden_size, "parallel.expert_tensor", "model.moe_ffn_hidden_size")
    check(
        model.moe_ffn_hidden_size // parallel.expert_tensor % 8 == 0,
        "parallel.expert_tensor",
        parallel.expert_tensor,
        f"leaves {model.moe_ffn_hidden_size // parallel.expert_tensor} neurons a rank; grouped GEMMs need a multiple of 8",
    )
    _divides(parallel.tensor, model.num_attention_heads, "parallel.tensor", "model.num_attention_heads")
    _divides(
        parallel.tensor,
        model.num_query_groups or model.num_attention_heads,
        "parallel.tensor",
        "model.num_query_groups",
    )
    _divides(parallel.tensor, model.seq_length, "parallel.tensor", "model.seq_length")
    _divides(parallel.tensor, model.vocab_multiple, "parallel.tensor", "model.vocab_multiple")
    if model.shared_expert_ffn_hidden_size:
        _divides(
            parallel.tensor,
            model.shared_expert_ffn_hidden_size,
            "parallel.tensor",
            "model.shared_expert_ffn_hidden_size",
        )
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    check(
        model.num_layers % chunks == 0,
        "parallel.pipeline",
        parallel.pipeline,
        f"pipeline x virtual_pipeline = {chunks} must divide model.num_layers={model.num_layers}; nearest: "
        f"{_divisors_near(chunks, model.num_layers)}",
    )
    check(
        parallel.virtual_pipeline is None or parallel.pipeline > 1,
        "parallel.virtual_pipeline",
        parallel.virtual_pipeline,
        "needs parallel.pipeline of at least 2",
    )
    check_skip(compute, why_not_skip(model, parallel, compute))
    check(
        compute.transformer_impl != "transformer_engine" or transformer_engine,
        "compute.transformer_impl",
        compute.transformer_impl,
        "needs a GPU and Transformer Engine (pip install 'mone[gpu]'); compute.transformer_impl=local needs neither",
    )
    check(
        compute.recompute != "selective" or "layernorm" not in compute.recompute_modules or transformer_engine,
        "compute.recompute_modules",
        compute.recompute_modules,
        "layernorm needs Transformer Engine",
    )
    check(
        parallel.context == 1 or transformer_engine,
        "parallel.context",
        parallel.context,
        "context parallelism needs GPUs and Transformer Engine",
    )
    check(
        parallel.context == 1 or model.seq_length % (2 * parallel.context) == 0,
        "parallel.context",
        parallel.context,
        f"model.seq_length={model.seq_length} must be a multiple of 2 x parallel.context",
    )
    check(
        compute.token_dispatcher == "alltoall" or model.expert_capacity_factor is None,
        "compute.token_dispatcher",
        compute.token_dispatcher,
        "model.expert_capacity_factor needs alltoall",
    )
