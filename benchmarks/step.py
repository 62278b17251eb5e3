"""Benchmarks a training step: MoNE with and without its balance loss, the plain MoE, and the same MoE in other frameworks.

    python -m benchmarks.step                                       # ours alone: what the loss costs, what selection saves
    python -m benchmarks.step peers=true                            # beside the other frameworks
    python -m benchmarks.step model=mone_small micro_batch_size=2 rounds=4 repeats=2
    python -m benchmarks.step bf16=true                             # beside bf16
    python -m benchmarks.step profile=true                          # profile of our step

Forward, backward, clipping and AdamW on random tokens, in fp32 unless the name says bf16, all cores in one process. Each
contender has a process of its own, which imports only what its users would import. The peers, all with torch's fused AdamW:

- Megatron-Core: its own layers, experts (SequentialMLP) and optimizer. "fused" compiles the functions that Megatron-Core
  marks for its JIT fuser (torch.compile), as it does by default. Both need the replacements of
  `mone_model.megatron.cpu_support`, without which Megatron-Core does not run on CPUs.
- transformers: Qwen3-MoE with its default experts (grouped GEMMs); "compiled" by torch.compile of the whole model.
- DeepSpeed: Qwen3 of transformers with DeepSpeed's MoE layer and its load-balancing loss in place of each MLP. "dropless"
  drops no tokens, like all others; by default the layer drops those beyond an expert's capacity, and so computes less.

The models of transformers and DeepSpeed have no shared expert, so with peers=true no contender has one.
"""

import contextlib
import functools
import statistics
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, Run, ratio, time_interleaved
from mone_common.console import command, to_dataclass
from mone_model.config import ModelConfig
from mone_model.weight_sources import WeightSource
from train.config import RunConfig, load_config


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    model: str = "mone_tiny"
    """A model of configs/model."""
    activation_ratio: float = 0.25
    """activation_ratio of MoNE; the others compute all neurons."""
    neuron_balance_coeff: float = 0.001
    """Coefficient of the balance loss, where it is on."""
    stride: int = 4
    """A contender takes the balance loss over every n-th token."""
    vocab_size: int = 4096
    """Vocabulary size."""
    micro_batch_size: int = 8
    """Sequences per step."""
    peers: bool = False
    """Measure the other frameworks, too, all models without a shared expert."""
    bf16: bool = False
    """Measure MoNE and the plain MoE with compute.precision=bf16, too; the profile is one of bf16."""
    leave_out: list[str] = field(default_factory=list)
    """Leave out contenders whose name contains one of these words; all contenders are in memory at once."""
    rounds: int = 7
    """Turns of each contender."""
    repeats: int = 8
    """Steps per turn."""
    profile: bool = False
    """Print a torch profile of `rounds` steps of MoNE with the balance loss instead."""


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_step", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)


def run_config(options: BenchmarkConfig, *overrides: str) -> RunConfig:
    """The configuration to time."""
    return compose(
        f"model={options.model}",
        f"model.vocab_size={options.vocab_size}",
        f"model.activation_ratio={options.activation_ratio}",
        f"training.micro_batch_size={options.micro_batch_size}",
        *(["model.shared_expert_ffn_hidden_size=0"] if options.peers else []),
        *overrides,
    )


def compose(*overrides: str) -> RunConfig:
    """The configuration of `train.pretrain` with these options."""
    overrides = ("data=demo", "training.global_batch_size=${training.micro_batch_size}", *overrides)
    GlobalHydra.instance().clear()  # the benchmark's own
    with hydra.initialize_config_module("configs", version_base="1.3"):
        return load_config(hydra.compose("pretrain", overrides=list(overrides)))


def random_tokens(config: RunConfig) -> Iterator[torch.Tensor]:
    """Yield random tokens [B, s + 1] endlessly."""
    generator = torch.Generator().manual_seed(0)
    vocab_size, shape = config.model.vocab_size, (config.training.micro_batch_size, config.model.seq_length + 1)
    assert vocab_size is not None
    while True:
        yield torch.randint(0, vocab_size, shape, generator=generator)


def megatron_step(config: RunConfig, weights: WeightSource | None = None) -> Callable[[], Any]:
    """A step of our engine over one micro-batch of this process, which returns a `StepResult`. weights: the initial ones."""
    from mone_model import megatron

    megatron.prepare()
    from train import runtime
    from train.engines.megatron import MegatronEngine

    group = contextlib.ExitStack()  # stays open as long as the process
    where = group.enter_context(runtime.distributed(config.parallel, seed=1, timeout_minutes=10))
    engine = MegatronEngine(config, where, weights)
    tokens = random_tokens(config)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for tokens_BS in tokens:
            size, length = tokens_BS.shape
            yield {
                "tokens": tokens_BS[:, :-1].contiguous(),
                "labels": tokens_BS[:, 1:].contiguous(),
                "loss_mask": torch.ones(size, length - 1),
                "position_ids": torch.arange(length - 1).expand(size, -1),
            }

    endless = batches()
    group.pop_all()
    return lambda: engine.train_step(endless, micro_batches=1, accept=lambda loss, grad_norm: True)


def build_ours(options: BenchmarkConfig, *overrides: str) -> Run:
    """A step of our model."""
    return megatron_step(run_config(options, *overrides))


def build_megatron(options: BenchmarkConfig, *, fused: bool) -> Run:
    """A step of our engine with Megatron-Core's own model."""
    from mone_model import megatron
    from mone_model.megatron import cpu_gemm, cpu_support

    if fused:
        cpu_support.jit_without_compiler = jit_with_compiler
    megatron.prepare()
    cpu_gemm.remove()
    from train.engines import megatron as engine

    with mock.patch.object(engine, "build_gpt", functools.partial(stock_gpt, fused=fused)):
        return megatron_step(run_config(options))


def jit_with_compiler() -> types.ModuleType:
    """megatron.core.jit as it is with torch 2.2 or later; the original cannot be imported before the rest of the package."""
    jit: Any = types.ModuleType("megatron.core.jit")
    jit.jit_fuser, jit.noop_decorator = torch.compile, lambda function: function
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    return jit


def stock_gpt(model: ModelConfig, parallel: Any, compute: Any, *, fused: bool, **_: Any) -> torch.nn.Module:
    """Megatron-Core's GPTModel with its local layers, DotProductAttention and SequentialMLP."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from mone_model.kernels.cpu import library
    from mone_model.megatron.transformer_config import transformer_config

    library.allowed = False  # for the life of this process
    config = transformer_config(model, parallel, compute)
    config.bias_activation_fusion = fused  # slower than the parts where nothing is compiled
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=model.num_experts, qk_layernorm=model.qk_layernorm, normalization="RMSNorm"
        ),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope",
    )


def build_transformers(options: BenchmarkConfig, *, compiled: bool) -> Run:
    """A step of Qwen3-MoE."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = run_config(options)
    model = config.model
    experts = {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.router_topk,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": True,
    }
    qwen = Qwen3MoeForCausalLM(Qwen3MoeConfig(**_attention_of(model), **experts))
    return _step_of(torch.compile(qwen) if compiled else qwen, config)


def build_deepspeed(options: BenchmarkConfig, *, drop_tokens: bool) -> Run:
    """A step of Qwen3 with DeepSpeed's MoE layers; drop_tokens: those beyond an expert's capacity."""
    import deepspeed
    from deepspeed.moe.layer import MoE
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    config = run_config(options)
    model = config.model
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for minutes; unused with one process
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed("gloo")
    settings = Qwen3Config(**_attention_of(model), intermediate_size=model.moe_ffn_hidden_size)
    qwen = Qwen3ForCausalLM(settings)

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            routing: dict[str, Any] = {"k": model.router_topk, "drop_tokens": drop_tokens}
            self.moe = MoE(model.hidden_size, Qwen3MLP(settings), model.num_experts, **routing)
            self.moe.set_deepspeed_parallelism()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, self.balance_loss, _ = self.moe(x)
            return y

    for layer in qwen.model.layers:
        layer.mlp = Experts()
    # Without the balance loss most tokens soon go to few experts, and a dropless layer pads all experts to the largest load.
    return _step_of(qwen, config, lambda: model.aux_loss_coeff * sum(layer.mlp.balance_loss for layer in qwen.model.layers))


def _attention_of(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups or model.num_attention_heads,
        "head_dim": model.head_size,
        "max_position_embeddings": model.seq_length,
        "use_cache": False,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _step_of(model: Any, config: RunConfig, other_losses: Callable[[], Any] = lambda: 0.0) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)
    tokens = random_tokens(config)

    def step() -> None:
        tokens_BS = next(tokens)[:, :-1]
        (model(input_ids=tokens_BS, labels=tokens_BS).loss + other_losses()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


WITHOUT, WITH = "MoNE", "MoNE, balance loss"
BF16 = "compute.precision=bf16"


@command("benchmark_step", path=None)
def main(hydra_config: DictConfig) -> None:
    """Run all contenders in turns."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    if options.profile:
        return print_profile(options)
    loss = f"model.neuron_balance_coeff={options.neuron_balance_coeff}"
    stride = f"model.neuron_balance_stride={options.stride}"
    contenders = {
        WITHOUT: functools.partial(build_ours, options),
        WITH: functools.partial(build_ours, options, loss),
        f"MoNE, loss over 1/{options.stride}": functools.partial(build_ours, options, loss, stride),
        "MoNE, bias": functools.partial(build_ours, options, "model.neuron_bias=true"),
        "plain MoE": functools.partial(build_ours, options, "model.activation_ratio=1"),
    }
    if options.bf16:
        contenders |= {
            "MoNE, bf16": functools.partial(build_ours, options, loss, BF16),
            "plain MoE, bf16": functools.partial(build_ours, options, "model.activation_ratio=1", BF16),
        }
    if options.peers:
        contenders |= {
            "Megatron-Core": functools.partial(build_megatron, options, fused=False),
            "Megatron-Core, fused": functools.partial(build_megatron, options, fused=True),
            "transformers": functools.partial(build_transformers, options, compiled=False),
            "transformers, compiled": functools.partial(build_transformers, options, compiled=True),
            "DeepSpeed, dropless": functools.partial(build_deepspeed, options, drop_tokens=False),
            "DeepSpeed, dropping": functools.partial(build_deepspeed, options, drop_tokens=True),
        }
    for word in options.leave_out:
        contenders = {name: build for name, build in contenders.items() if word not in name}
    config = run_config(options)
    tokens = config.training.micro_batch_size * config.model.seq_length
    model = f"{options.model}, no shared expert" if options.peers else options.model
    print(f"{model}, activation_ratio={options.activation_ratio}, fp32, {tokens} tokens a step, ", end="")
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds of {options.repeats} steps")
    report(time_interleaved(contenders, options.rounds, options.repeats), tokens)


def report(seconds: dict[str, list[float]], tokens: int) -> None:
    """Print the time of each contender, and that of MoNE with and without its loss relative to it."""
    ours = [name for name in (WITHOUT, WITH) if name in seconds]
    print(f"  {'':24}{'step':>10}{'tokens/s':>10}", *(f"{name + ' / it':28}" for name in ours), sep="   ")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = [f"{'' if name == mine else ratio(seconds[mine], times):28}" for mine in ours]
        print(f"  {name:24}{1000 * median:7.0f} ms{tokens / median:10,.0f}", *ratios, sep="   ")


def print_profile(options: BenchmarkConfig) -> None:
    """Print the milliseconds per step of each operation that takes over 1 % of a step."""
    precision = [BF16] if options.bf16 else []
    step = build_ours(options, f"model.neuron_balance_coeff={options.neuron_balance_coeff}", *precision)
    for _ in range(5):  # the first profiles are slower, because matrix products allocate new pages
        for _ in range(options.rounds):
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(options.rounds):
                step()
    milliseconds = {event.key: event.self_cpu_time_total / 1000 / options.rounds for event in profiler.key_averages()}
    whole = sum(milliseconds.values())
    for name, part in sorted(milliseconds.items(), key=lambda item: -item[1]):
        if part > whole / 100:
            print(f"  {part:6.1f} ms  {name}")
    print(f"  {whole:6.1f} ms  in all")


if __name__ == "__main__":
    main()
