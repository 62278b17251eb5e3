"""Benchmarks a training step against the same model in other frameworks, and against a plain matrix product.

    python -m benchmarks.step model=mone_tiny
    python -m benchmarks.step model=mone_small micro_batch_size=2 leave_out=[dropless]     # for 24 GiB
    python -m benchmarks.step profile=true                          # profile of our step

Forward, backward, clipping and AdamW on random tokens, fp32, all cores in one process. All contenders use fused AdamW:

- Megatron-Core: its own layers, experts (SequentialMLP) and optimizer, with our dispatcher, gradient norm and clipping.
- transformers: Qwen3-MoE with its default experts (grouped GEMMs).
- DeepSpeed MoE: Qwen3 of transformers with DeepSpeed's MoE layer and its load-balancing loss instead of each MLP. By default
  it drops tokens (capacity factor 1); "dropless" drops none, like the other contenders.

The last two have no shared expert, and are compared with our model without one.

In a second pass the others run with our matrix products (`mone_model.megatron.cpu_gemm`) and memory settings, so that the
ratio shows the difference of the models only.

"bound" is a lower bound for any experts: the measured time of our model without MoE layers, plus the operations that remain
when dropped neurons are skipped, at the speed of the plain product.
"""

import contextlib
import functools
import statistics
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
from mone_model import megatron

megatron.prepare()  # also in the processes of the contenders, which import this module
# ruff: noqa: E402

from mone_model.accounting import count_flops
from mone_model.config import ModelConfig
from mone_model.kernels.cpu import library as cpu_library
from mone_model.megatron import cpu_gemm
from train import runtime
from train.config import RunConfig, load_config


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    model: str = "mone_tiny"
    """A model of configs/model."""
    activation_ratio: float = 0.25
    """activation_ratio of our model; the others compute all neurons."""
    vocab_size: int = 4096
    """Vocabulary size."""
    micro_batch_size: int = 8
    """Sequences per step."""
    rounds: int = 7
    """Turns of each contender."""
    repeats: int = 8
    """Steps per turn."""
    leave_out: list[str] = field(default_factory=list)
    """Leave out contenders whose name contains one of these words; all contenders are in memory at once."""
    profile: bool = False
    """Print a torch profile of `rounds` steps of our model instead."""


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_step", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)


def run_config(options: BenchmarkConfig, *, shared: bool) -> RunConfig:
    """The configuration to time; shared: with the shared expert."""
    return compose(
        f"model={options.model}",
        f"model.vocab_size={options.vocab_size}",
        f"model.activation_ratio={options.activation_ratio}",
        f"training.micro_batch_size={options.micro_batch_size}",
        *([] if shared else ["model.shared_expert_ffn_hidden_size=0"]),
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


def prepare(*, with_ours: bool) -> None:
    """Set up this process with our matrix products and memory settings, or with torch's defaults."""
    torch.set_num_threads(torch.get_num_threads())
    if with_ours:
        runtime.keep_freed_memory()
    else:
        cpu_gemm.remove()
        runtime.keep_freed_memory = lambda: None


def build_megatron(options: BenchmarkConfig, *, shared: bool, stock: bool, with_ours: bool, moe: bool = True) -> Run:
    """A step of our engine; stock: with Megatron-Core's own layers and experts; moe=False: MoE layers return their input."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from train.engines import megatron

    prepare(with_ours=with_ours)
    if not moe:  # for the life of this process
        MoELayer.forward = lambda self, hidden, *_, **__: (hidden, None)
    build = build_stock if stock else megatron.build_gpt
    with mock.patch.object(megatron, "build_gpt", build):
        return megatron_step(run_config(options, shared=shared))


def megatron_step(config: RunConfig) -> Run:
    """A step of our engine over one micro-batch of this process."""
    from train.engines.megatron import MegatronEngine

    group = contextlib.ExitStack()  # stays open as long as the process
    where = group.enter_context(runtime.distributed(config.parallel, seed=1, timeout_minutes=10))
    engine = MegatronEngine(config, where)
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


def build_stock(model: ModelConfig, parallel: Any, compute: Any, **_: Any) -> torch.nn.Module:
    """Megatron-Core's GPTModel with its local layers, DotProductAttention and SequentialMLP."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from mone_model.megatron.transformer_config import transformer_config

    cpu_library.allowed = False  # for the life of this process
    config = transformer_config(model, parallel, compute)
    config.bias_activation_fusion = False  # its default; the fused form is slower without torch.compile
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


def build_transformers(options: BenchmarkConfig, *, with_ours: bool) -> Run:
    """A step of Qwen3-MoE."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    prepare(with_ours=with_ours)
    config = run_config(options, shared=False)
    model = config.model
    experts = {
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.router_topk,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "norm_topk_prob": True,
    }
    return _step_of(Qwen3MoeForCausalLM(Qwen3MoeConfig(**_attention_of(model), **experts)), config)


def build_deepspeed(options: BenchmarkConfig, *, drop_tokens: bool, with_ours: bool) -> Run:
    """A step of Qwen3 with DeepSpeed's MoE layers; drop_tokens: those beyond an expert's capacity."""
    import deepspeed
    from deepspeed.moe.layer import MoE
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    prepare(with_ours=with_ours)
    config = run_config(options, shared=False)
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


def _step_of(model: torch.nn.Module, config: RunConfig, other_losses: Callable[[], Any] = lambda: 0.0) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, fused=True)
    tokens = random_tokens(config)

    def step() -> None:
        tokens_BS = next(tokens)[:, :-1]
        (model(input_ids=tokens_BS, labels=tokens_BS).loss + other_losses()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_product(size: int = 2048, *, with_ours: bool) -> Run:
    """A plain fp32 matrix product."""
    prepare(with_ours=with_ours)
    a, b = torch.randn(size, size), torch.randn(size, size)
    return lambda: torch.mm(a, b)


PRODUCT_FLOPS = 2 * 2048**3


@command("benchmark_step", path=None)
def main(hydra_config: DictConfig) -> None:
    """Run all contenders in turns, first with the others as they are, then with our matrix products."""
    options = to_dataclass(hydra_config, BenchmarkConfig)

    def of(build: Callable[..., Run], *arguments: Any, **more: Any) -> functools.partial[Run]:
        return functools.partial(build, *arguments, **more)

    if options.profile:
        return print_profile(options)
    config = run_config(options, shared=True)
    models = {"ours": config.model, "ours, no shared expert": run_config(options, shared=False).model}
    tokens = config.training.micro_batch_size * config.model.seq_length
    print(f"{options.model}, activation_ratio={options.activation_ratio}, {tokens} tokens a step, ", end="")
    print(f"{torch.get_num_threads()} threads, {options.rounds} rounds of {options.repeats} steps")
    # Two passes, because all contenders of a pass are in memory at once.
    for with_ours in (False, True):
        ours = functools.partial(build_megatron, options, stock=False, with_ours=True)
        others = {
            "Megatron-Core": of(build_megatron, options, shared=True, stock=True, with_ours=with_ours),
            "transformers": of(build_transformers, options, with_ours=with_ours),
            "DeepSpeed MoE": of(build_deepspeed, options, drop_tokens=True, with_ours=with_ours),
            "DeepSpeed MoE, dropless": of(build_deepspeed, options, drop_tokens=False, with_ours=with_ours),
        }
        contenders = {
            "ours": of(ours, shared=True),
            "ours, no shared expert": of(ours, shared=False),
            "ours, no MoE layers": of(ours, shared=False, moe=False),
            "matrix product": of(build_product, with_ours=with_ours),
        }
        contenders |= {name: other for name, other in others.items() if not any(word in name for word in options.leave_out)}
        seconds = time_interleaved(contenders, options.rounds, options.repeats)
        print("Theirs with our matrix products and use of memory:" if with_ours else "Theirs as they are:")
        report(seconds, models, tokens)


def report(seconds: dict[str, list[float]], models: dict[str, ModelConfig], tokens: int) -> None:
    """Print the time of each contender, the ratio of ours to theirs, and our FLOP/s relative to a plain product."""
    without_moe, product = seconds["ours, no MoE layers"], seconds["matrix product"]
    for name, times in seconds.items():
        print(f"  {name:24} {1000 * statistics.median(times):8.0f} ms", end="")
        if name == "matrix product":
            print(f"   {PRODUCT_FLOPS / statistics.median(times) / 1e9:.0f} GFLOP/s")
        elif name.startswith("ours"):
            print()
        else:
            side = "ours" if name == "Megatron-Core" else "ours, no shared expert"
            owed = moe_flops(models[side]) * tokens / PRODUCT_FLOPS
            bound = [rest + owed * alone for rest, alone in zip(without_moe, product, strict=True)]
            print(f"   ours / it: {ratio(seconds[side], times)}   bound: {ratio(bound, times)}")
    for name, per_token in training_flops(models["ours"]).items():
        rates = zip(seconds["ours"], product, strict=True)
        share = [per_token * tokens / step / (PRODUCT_FLOPS / alone) for step, alone in rates]
        print(f"  FLOP/s {name} / those of the matrix product: {statistics.median(share):.2f}", end="")
        print(f" [{min(share):.2f}, {max(share):.2f}]")


def print_profile(options: BenchmarkConfig) -> None:
    """Print the milliseconds per step of each operation that takes over 1 % of a step, without the shared expert."""
    step = build_megatron(options, shared=False, stock=False, with_ours=True)
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


def training_flops(model: ModelConfig) -> dict[str, int]:
    """Training FLOPs per token: of the dense model, and without products of dropped neurons."""
    dense = 3 * count_flops(model).dense
    return {DENSE: dense, SKIPPED: dense - moe_flops(model, skipping=False) + moe_flops(model)}


def moe_flops(model: ModelConfig, *, skipping: bool = True) -> int:
    """Training FLOPs per token of all experts; skipping: count one of nine products (the gate) for dropped neurons."""
    k = model.active_neurons if skipping else model.moe_ffn_hidden_size
    routed = model.router_topk * (model.moe_ffn_hidden_size + 8 * k)
    return 2 * model.hidden_size * model.num_layers * (routed + 9 * model.shared_expert_ffn_hidden_size)


DENSE, SKIPPED = "of the dense model", "left when dropped neurons are skipped"


if __name__ == "__main__":
    main()
