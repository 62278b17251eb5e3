"""Rules that span sections of the configuration or need the world size.

validate(config, world_size)              # ValueError before anything is built
"""

import math
from collections.abc import Iterator

from mone_common.checks import check
from mone_model.config import ModelConfig, ParallelConfig, why_not_sparse
from mone_model.megatron.transformer_engine import uses_transformer_engine
from train.config import RunConfig

PROCESSES = "torchrun --nproc-per-node"
"""Sets the number of processes of a run that is started by hand; quoted in errors."""


def validate(
    config: RunConfig, world_size: int, *, transformer_engine: bool | None = None, processes: str = PROCESSES
) -> None:
    """Check the rules that span sections or need the world size; ValueError names the option, its value and a way out.

    transformer_engine: whether the run uses Transformer Engine's layers; None: decide for this machine.
    processes: the options that set the world size, as the user types them.
    """
    parallel, training = config.parallel, config.training
    if transformer_engine is None:
        transformer_engine = uses_transformer_engine(config.compute)
    _validate_layout(config, world_size, transformer_engine, processes)
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
        f"nearest training.global_batch_size: {_or(_multiples(training.global_batch_size, per_pass * parallel.pipeline))}",
    )
    optimizer = config.optimizer
    last = optimizer.decay_steps or training.steps
    assert optimizer.warmup_steps is not None, "RunConfig replaces null"
    check(
        optimizer.warmup_steps < last,
        "optimizer.warmup_steps",
        optimizer.warmup_steps,
        f"must be below the end of the decay, step {last}; optimizer.warmup_steps=null takes at most a tenth of it",
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


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _nearest(value: int, choices: list[int]) -> str:
    """The two choices closest to a value."""
    return ", ".join(map(str, sorted(sorted(choices, key=lambda choice: abs(choice - value))[:2])))


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _multiples(value: int, of: int) -> list[int]:
    """The multiples of `of` below and above a value."""
    below = value // of * of
    return [below, below + of] if below else [of]


def _misfits(model: ModelConfig, parallel: ParallelConfig, world_size: int) -> Iterator[str]:
    """Errors for degrees of parallelism that do not fit the model's sizes, with the nearest degrees that fit.

    Degrees that also fit the number of processes are proposed first, if any is above 1.
    """
    dense, sparse = parallel.pipeline * parallel.context, parallel.pipeline
    heads, hidden = model.num_attention_heads, model.moe_ffn_hidden_size
    sizes = {
        "model.num_attention_heads": heads,
        "model.num_query_groups": model.num_query_groups or heads,
        "model.seq_length": model.seq_length,
        "model.vocab_multiple": model.vocab_multiple,
        "model.shared_expert_ffn_hidden_size": model.shared_expert_ffn_hidden_size or 0,
    }
    shares = [degree for degree in _divisors(hidden) if hidden // degree % 8 == 0]
    for name, others, numbers, allowed in (
        ("expert", parallel.expert_tensor * sparse, {"model.num_experts": model.num_experts}, _divisors(model.num_experts)),
        ("expert_tensor", parallel.expert * sparse, {"model.moe_ffn_hidden_size": hidden}, shares),
        ("tensor", dense, sizes, _divisors(math.gcd(*sizes.values()))),
    ):
        degree = getattr(parallel, name)
        launched = [each for each in allowed if world_size % (each * others) == 0]
        nearest = _nearest(degree, launched if len(launched) > 1 else allowed)
        for size, number in numbers.items():
            if number % degree:
                yield f"parallel.{name}={degree}: must divide {size}={number}; nearest: {nearest}"
        if name == "expert_tensor" and degree not in allowed:
            yield (
                f"parallel.{name}={degree}: leaves {hidden // degree} neurons a rank; "
                f"grouped GEMMs need a multiple of 8; nearest: {nearest}"
            )
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if model.num_layers % chunks:
        yield (
            f"parallel.pipeline={parallel.pipeline}: pipeline x virtual_pipeline = {chunks} must divide "
            f"model.num_layers={model.num_layers}; nearest: {_nearest(chunks, _divisors(model.num_layers))}"
        )


def _starts(config: RunConfig, world_size: int) -> str:
    """The nearest smaller and larger number of processes that fit the layout and, if possible, the batch size."""
    parallel, training = config.parallel, config.training
    dense = parallel.tensor * parallel.pipeline * parallel.context
    unit = math.lcm(dense, parallel.expert * parallel.expert_tensor * parallel.pipeline)
    passes = training.global_batch_size // training.micro_batch_size
    whole = training.global_batch_size % training.micro_batch_size == 0
    # The number of processes is dense x data-parallel size; the latter divides the micro-batches of a step.
    allowed = [dense * size for size in _divisors(passes) if whole and dense * size % unit == 0]
    allowed = allowed or _multiples(world_size, unit)
    below = [number for number in allowed if number < world_size]
    above = [number for number in allowed if number > world_size]
    return _or([*below[-1:], *above[:1]])


def _validate_layout(config: RunConfig, world_size: int, transformer_engine: bool, processes: str) -> None:
    model, parallel, compute = config.model, config.parallel, config.compute
    misfit = next(_misfits(model, parallel, world_size), None)
    dense = parallel.tensor * parallel.pipeline * parallel.context
    sparse = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world_size % dense or world_size % sparse:
        product = f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} = {dense}"
        equation = f"{world_size} = data x {dense}"
        if world_size % dense == 0:
            experts = f"expert {parallel.expert} x expert_tensor {parallel.expert_tensor}"
            product, equation = f"{experts} x pipeline {parallel.pipeline} = {sparse}", str(world_size)
        # If the degree does not fit the model, another number of processes does not help.
        way_out = misfit or f"start {_starts(config, world_size)} ({processes})"
        raise ValueError(f"parallel={product}: must divide the number of processes, {equation}; {way_out}")
    if misfit is not None:
        raise ValueError(misfit)
    check(
        parallel.virtual_pipeline is None or parallel.pipeline > 1,
        "parallel.virtual_pipeline",
        parallel.virtual_pipeline,
        "needs parallel.pipeline of at least 2",
    )
    check(
        not model.neuron_score.startswith("random") or parallel.expert_tensor == 1,
        "model.neuron_score",
        model.neuron_score,
        f"needs whole experts: parallel.expert_tensor=1, not {parallel.expert_tensor}",
    )
    obstacle = why_not_sparse(model, parallel, compute)
    check(
        compute.experts != "sparse" or obstacle is None,
        "compute.experts",
        compute.experts,
        f"{obstacle}; use compute.experts=auto",
    )
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
