"""Estimates memory, communication and time of a configuration on a cluster.

estimate = estimate_run(config, cluster)      # .memory .fits .traffic .traffic_seconds .compute_seconds
estimates = propose(config, cluster)          # other layouts that fit, the fastest first
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from launch.cluster import WITH_BF16, ClusterConfig
from mone_model.accounting import Memory, Traffic, count_communication, count_flops
from mone_model.config import ComputeConfig, ParallelConfig
from train.config import RunConfig
from train.config_rules import validate
from train.config_sections import TrainingConfig


@dataclass(frozen=True)
class Estimate:
    """One configuration on one cluster."""

    config: RunConfig
    memory: Memory
    fits: bool
    traffic: dict[str, Traffic]
    """Data that a rank sends in a step, by parallel dimension."""
    compute_seconds: float
    """Time of a step at cluster.mfu, with recomputation and the pipeline bubble."""
    traffic_seconds: dict[str, float]
    """Time of a step's communication by parallel dimension, at the data sheets' bandwidth and without overlap."""

    @property
    def seconds(self) -> float:
        """Time of a step without overlap. It only ranks layouts: a measured MFU already includes communication."""
        return self.compute_seconds + sum(self.traffic_seconds.values())


def uses_transformer_engine(config: RunConfig, cluster: ClusterConfig) -> bool:
    """Whether training would use Transformer Engine layers on that cluster, which need a GPU with bf16."""
    return not cluster.is_cpu and cluster.gpu in WITH_BF16 and config.compute.transformer_impl != "local"


def check_run(config: RunConfig, cluster: ClusterConfig) -> None:
    """Raise ValueError if this configuration cannot run on that cluster."""
    cluster.tflops(config.compute.precision)
    validate(
        config,
        cluster.world_size,
        transformer_engine=uses_transformer_engine(config, cluster),
        processes="cluster.nodes x cluster.gpus_per_node",
    )


def estimate_run(config: RunConfig, cluster: ClusterConfig) -> Estimate:
    """Estimate a configuration that `check_run` has accepted."""
    model, parallel, compute = config.model, config.parallel, config.compute
    world, micro_batches = cluster.world_size, config.micro_batches(cluster.world_size)
    memory = config.estimate_memory(world, fused=uses_transformer_engine(config, cluster))
    traffic = count_communication(
        model,
        parallel,
        compute,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_size=config.data_parallel_size(world),
        micro_batches=micro_batches,
    )
    flops = 3 * count_flops(model).dense * config.training.global_batch_size * model.seq_length
    rate = world * cluster.tflops(compute.precision) * 1e12 * cluster.mfu
    recomputed = {"none": 1.0, "selective": 1.1, "full": 4 / 3}[compute.recompute]
    bubble = 1 + (parallel.pipeline - 1) / (micro_batches * (parallel.virtual_pipeline or 1))
    return Estimate(
        config=config,
        memory=memory,
        fits=memory.total <= cluster.usable_gib * 2**30,
        traffic=traffic,
        compute_seconds=flops / rate * recomputed * bubble,
        traffic_seconds={name: part.bytes / 1e9 / cluster.gb_per_second(part.span) for name, part in traffic.items()},
    )


def propose(config: RunConfig, cluster: ClusterConfig, number: int = 5) -> list[Estimate]:
    """Layouts of the same model and batch that fit this cluster, the fastest first."""
    found = []
    for parallel, compute, training in _layouts(config, cluster):
        candidate = dataclasses.replace(config, parallel=parallel, compute=compute, training=training)
        try:
            check_run(candidate, cluster)
        except ValueError:
            continue
        estimate = estimate_run(candidate, cluster)
        if estimate.fits:
            found.append(estimate)
    # Of two equally fast layouts, prefer the larger micro-batch: its GEMMs are more efficient.
    return sorted(found, key=lambda estimate: (estimate.seconds, -estimate.config.training.micro_batch_size))[:number]


def _layouts(config: RunConfig, cluster: ClusterConfig) -> Iterator[tuple[ParallelConfig, ComputeConfig, TrainingConfig]]:
    def divisors(number: int) -> list[int]:
        return [divisor for divisor in range(1, number + 1) if number % divisor == 0]

    tensor = divisors(cluster.gpus_per_node)
    pipeline = (
        [1] if config.engine == "deepspeed" else [stages for stages in divisors(config.model.num_layers) if stages <= 16]
    )
    expert = [ranks for ranks in divisors(config.model.num_experts) if ranks <= cluster.world_size]
    recompute = [
        ("none", config.compute.recompute_modules),
        ("selective", ["moe"]),
        ("full", config.compute.recompute_modules),
    ]
    micro_batch_sizes = sorted({1, config.training.micro_batch_size})
    for tp, pp, ep, (kind, modules), size in itertools.product(tensor, pipeline, expert, recompute, micro_batch_sizes):
        yield (
            dataclasses.replace(config.parallel, tensor=tp, pipeline=pp, virtual_pipeline=None, expert=ep, expert_tensor=1),
            dataclasses.replace(config.compute, recompute=kind, recompute_modules=list(modules)),
            dataclasses.replace(config.training, micro_batch_size=size),
        )
