"""Estimates parameters, memory, communication and time of a run, and proposes layouts that fit.

    mone-plan model=mone_2p8b compute.precision=bf16 parallel.expert=8 training.global_batch_size=1024 \\
        cluster.gpu=h100 cluster.nodes=8
    mone-plan --help

Needs no GPU, no data and no cluster. The exit code is 1 if the run does not fit.
"""

import dataclasses
import sys
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from launch.cluster import WITH_BF16, ClusterConfig
from launch.estimate import Estimate, check_run, estimate_run, propose
from mone_common.checks import check
from mone_common.console import UserError, command
from mone_model.accounting import Memory, count_parameters, count_training_flops
from train.config import RunConfig, load_config


@dataclass
class PlanConfig(RunConfig):
    """Options of a run and of its cluster."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tokens: float | None = None
    """Tokens to train on, e.g. tokens=100e9; null: training.steps x training.global_batch_size x model.seq_length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.tokens is None or self.tokens > 0, "tokens", self.tokens, "must be null or positive")


ConfigStore.instance().store(name="plan_config", node=PlanConfig)


@command("plan")
def main(hydra_config: DictConfig) -> None:
    """Print the plan."""
    try:
        config = load_config(hydra_config)
        assert isinstance(config, PlanConfig)
        if config.model.vocab_size is None:
            config.model.vocab_size = _vocabulary(config)
        check_run(config, config.cluster)
    except ValueError as error:
        raise UserError(str(error)) from error
    estimate = estimate_run(config, config.cluster)
    print(describe_plan(config, estimate))
    if not estimate.fits:
        sys.exit(1)


def describe_plan(config: PlanConfig, estimate: Estimate) -> str:
    """The whole plan as text."""
    return "\n\n".join(
        [
            _describe_model(config),
            _describe_memory(config, estimate),
            _describe_messages(config, estimate),
            _describe_time(config, estimate),
            _describe_proposals(config, estimate),
        ]
    )


def _vocabulary(config: RunConfig) -> int:
    from train.sample_order import load_manifests  # imports numpy

    how = "set it, e.g. model.vocab_size=32000, or give the data that defines it, e.g. data=demo"
    check(bool(config.data.blend), "model.vocab_size", "null", how)
    try:
        return load_manifests(config)[0].vocab_size
    except ValueError as error:
        raise ValueError(f"model.vocab_size=null: {how} ({error})") from error


def _describe_model(config: PlanConfig) -> str:
    model, parameters = config.model, count_parameters(config.model)
    flops = count_training_flops(model, config.training.steps)
    return _table(
        "Model",
        [
            ("parameters", _count(parameters.total)),
            ("of routed experts", _count(parameters.experts)),
            ("active for one token", _count(parameters.active)),
            (
                "activation_ratio",
                f"{model.activation_ratio:g}, K = {model.describe_active_neurons()} of {model.moe_ffn_hidden_size} neurons",
            ),
            ("active_expert_params", f"{parameters.active_expert_params:.1%}, {_count(parameters.active_experts)}"),
            ("active_moe_params", f"{parameters.active_moe_params:.1%}, with router and shared expert"),
            ("training FLOPs per token", f"{flops.dense:.3g} dense, {flops.sparse:.3g} for kept neurons only"),
        ],
    )


def _describe_memory(config: PlanConfig, estimate: Estimate) -> str:
    cluster, memory = config.cluster, estimate.memory
    parts = [(part.name, _gib(getattr(memory, part.name))) for part in dataclasses.fields(Memory)]
    rows = [*parts, ("total", f"{_gib(memory.total)} of {cluster.usable_gib:g} GiB usable on {cluster.gpu}")]
    rows += [(f"activations with compute.recompute={kind}", _gib(size)) for kind, size in _with_recompute(config).items()]
    text = _table("Memory of the fullest rank", rows)
    if not estimate.fits:
        text += f"\n  WARNING: {_gib(memory.total)} do not fit in {cluster.usable_gib:g} GiB"
    return text


def _with_recompute(config: PlanConfig) -> dict[str, int]:
    """Activations and working space in bytes, for each kind of recomputation."""
    sizes = {}
    for kind in ("none", "selective", "full"):
        compute = dataclasses.replace(config.compute, recompute=kind)
        memory = estimate_run(dataclasses.replace(config, compute=compute), config.cluster).memory
        sizes[f"{kind} {compute.recompute_modules}" if kind == "selective" else kind] = memory.activations + memory.working
    return sizes


def _describe_messages(config: PlanConfig, estimate: Estimate) -> str:
    rows = []
    for name, part in estimate.traffic.items():
        where = "inside a node" if part.span <= config.cluster.gpus_per_node else "between nodes"
        rows.append((f"{name} ({part.ranks})", f"{_gib(part.bytes)}, {where}: {estimate.traffic_seconds[name]:.3g} s"))
    return _table("Data sent by a rank in a step, at the data sheets' bandwidth", rows or [("none", "one rank")])


def _describe_time(config: PlanConfig, estimate: Estimate) -> str:
    cluster, training, model = config.cluster, config.training, config.model
    batch = training.global_batch_size * model.seq_length
    tokens = config.tokens or training.steps * batch
    hours = tokens / batch * estimate.compute_seconds / 3600
    return _table(
        f"Time, at cluster.mfu={cluster.mfu:g} of {cluster.tflops(config.compute.precision):g} TFLOP/s",
        [
            ("ranks", f"{cluster.world_size} = {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu}"),
            ("tokens", f"{tokens:.4g} in {tokens / batch:,.0f} steps of {batch:,}"),
            ("step", f"{estimate.compute_seconds:.3g} s, {batch / estimate.compute_seconds:,.0f} tokens/s"),
            ("hours", f"{hours:,.1f}; {hours * cluster.world_size:,.0f} device hours"),
        ],
    )


def _describe_proposals(config: PlanConfig, estimate: Estimate) -> str:
    proposals = propose(config, config.cluster)
    if not proposals:
        halves = "compute.precision=bf16 halves activations"
        return "No layout fits: use more nodes (cluster.nodes), a shorter model.seq_length, or a smaller model" + (
            f"; {halves}" if config.compute.precision == "fp32" and config.cluster.gpu in WITH_BF16 else ""
        )
    rows = []
    for proposal in proposals:
        parallel, compute = proposal.config.parallel, proposal.config.compute
        options = [f"parallel.{name}={getattr(parallel, name)}" for name in ("tensor", "pipeline", "expert")]
        options += [
            f"training.micro_batch_size={proposal.config.training.micro_batch_size}",
            f"compute.recompute={compute.recompute}",
        ]
        if compute.recompute == "selective":
            options.append(f"'compute.recompute_modules=[{','.join(compute.recompute_modules)}]'")
        rows.append((f"{proposal.seconds:.3g} s, {_gib(proposal.memory.total)}", " ".join(options)))
    ours = f"{estimate.seconds:.3g} s" + ("" if estimate.fits else ", does not fit")
    return _table(f"Layouts that fit, fastest first (step time without overlap of communication; this layout: {ours})", rows)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows)])


def _count(number: float) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


if __name__ == "__main__":
    main()
