import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import configs
from mone_model.accounting import (
    count_communication,
    count_flops,
    count_parameters,
    count_training_flops,
    equal_active_width,
    equal_flops_width,
    equal_total_experts,
    equal_total_width,
    estimate_memory,
)
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, RatioPoint
from mone_model.megatron.gpt import build_gpt
from tests.conftest import ROOT
from tests.tiny import TINY_MODEL, always
from train.config import RunConfig
from train.config_sections import TrainingConfig
from train.engines.megatron import MegatronEngine
from train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_process")

SMALL = TINY_MODEL | {
    "num_attention_heads": 4,
    "vocab_size": 50,
    "moe_ffn_hidden_size": 24,
    "shared_expert_ffn_hidden_size": 40,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"activation_ratio": 1.0, "tie_embeddings": True},
    {"activation_ratio": 0.5, "layer_activation_ratios": [0.75, 0.25]},
    {"num_query_groups": 2, "kv_channels": 16, "qk_layernorm": False, "router_topk": 3},
    {"shared_expert_ffn_hidden_size": 0},
    {"num_query_groups": 2, "qk_layernorm_scope": "projection"},
]


def model_config(name: str) -> ModelConfig:
    path = Path(configs.__file__).parent / "model" / f"{name}.yaml"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(path)))
    assert isinstance(config, ModelConfig)
    return config


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_equal_those_of_the_built_model(variant: dict[str, Any]) -> None:
    model = ModelConfig(**SMALL | variant)
    built = build_gpt(model, ParallelConfig(), ComputeConfig(), seed=0)
    counted = count_parameters(model)
    assert counted.total == sum(weight.numel() for weight in built.parameters())
    assert counted.experts == sum(weight.numel() for name, weight in built.named_parameters() if ".experts." in name)


def test_a_selecting_shared_expert_counts_kept_neurons() -> None:
    model = ModelConfig(**SMALL | {"shared_expert_neuron_ratio": 0.25, "activation_ratio": 0.5})
    # 2 of 4 experts with 24 + 2 * 12 of 72 rows each, 40 + 2 * 10 of 120 rows of the shared expert, 4 of the router.
    assert count_parameters(model).active_moe_params == (4 + 2 * 48 + 60) / (4 + 2 * 72 + 120)


@given(dense=st.integers(16, 5000), ratio=st.floats(1 / 64, 1))
def test_experts_of_equal_active_width_cost_a_token_what_the_dense_one_does(dense: int, ratio: float) -> None:
    width = equal_active_width(dense, ratio)
    model = ModelConfig(**SMALL | {"moe_ffn_hidden_size": width, "activation_ratio": ratio})
    touched = count_parameters(model).active_experts / (model.router_topk * model.num_layers * model.hidden_size)
    # Tolerance: half a multiple of 8 neurons, each with 1 + 2 ratio weights per channel, and half a kept neuron.
    assert abs(touched - 3 * dense) <= 4 * (1 + 2 * ratio) + 1
    assert width % 8 == 0


@given(dense=st.integers(16, 5000), ratio=st.floats(1 / 64, 1))
def test_experts_of_equal_flops_width_owe_what_the_dense_one_does(dense: int, ratio: float) -> None:
    width = equal_flops_width(dense, ratio)
    model = ModelConfig(**SMALL | {"moe_ffn_hidden_size": width, "activation_ratio": ratio, "neuron_balance_coeff": 0.0})
    # Nine products of each neuron, one of them (the gate forward) for all and eight for those that are kept.
    owed = model.moe_ffn_hidden_size + 8 * model.active_neurons
    # Tolerance: half a multiple of 8 neurons, and half a kept neuron.
    assert abs(owed - 9 * dense) <= 4 * (1 + 8 * ratio) + 4 + 1
    assert width % 8 == 0


def test_owed_training_flops_leave_out_the_backward_pass_of_dropped_gates() -> None:
    base = SMALL | {"neuron_balance_coeff": 0.0}
    model, twin = ModelConfig(**base), ModelConfig(**base | {"activation_ratio": 1.0})
    owed, of_plain = count_training_flops(model), count_training_flops(twin)
    assert of_plain.sparse == of_plain.dense == owed.dense == 3 * count_flops(model).dense
    product = 2 * model.hidden_size * model.router_topk * model.num_layers
    dropped = model.moe_ffn_hidden_size - model.active_neurons
    assert owed.dense - owed.sparse == 8 * product * dropped
    # The loss sends gradients to the gates of dropped neurons, except in the form that leaves them out.
    for form, products in (("normalised", 6), ("unmasked", 6), ("masked", 8)):
        balanced = count_training_flops(ModelConfig(**base | {"neuron_balance_coeff": 0.1, "neuron_balance_form": form}))
        assert balanced.dense - balanced.sparse == products * product * dropped


@pytest.mark.parametrize(
    ("score", "of_dropped", "projected"), [("gate", 1, 0), ("abs_gate_up", 2, 0), ("random", 0, 0), ("frozen", 0, 1)]
)
def test_a_score_owes_what_it_reads_of_dropped_neurons(score: str, of_dropped: int, projected: int) -> None:
    base = SMALL | {"neuron_balance_coeff": 0.0}
    model, gate = ModelConfig(**base | {"neuron_score": score}), ModelConfig(**base)
    neurons = model.moe_ffn_hidden_size
    dropped = neurons - model.active_neurons
    rows = model.num_layers * model.router_topk * model.hidden_size
    assert count_parameters(model).active - count_parameters(gate).active == rows * dropped * (of_dropped - 1)
    for count in (count_flops, count_training_flops):  # the extra rows are read in the forward pass only
        found, of_gate = count(model), count(gate)
        assert found.sparse - of_gate.sparse == 2 * rows * (dropped * (of_dropped - 1) + projected * neurons)
        assert found.dense - of_gate.dense == 2 * rows * projected * neurons
    # A balance loss that reaches dropped neurons needs their gates.
    balanced = base | {"neuron_balance_coeff": 0.1}
    found, of_gate = (count_training_flops(ModelConfig(**balanced | {"neuron_score": each})) for each in (score, "abs_gate"))
    assert found.sparse - of_gate.sparse == 2 * rows * (dropped * max(of_dropped - 1, 0) + projected * neurons)


def test_random_selection_in_training_owes_all_neurons_afterwards() -> None:
    base = SMALL | {"neuron_balance_coeff": 0.0}
    model, random = (ModelConfig(**base | {"neuron_score": score}) for score in ("random_in_training", "random"))
    assert count_parameters(model).active_expert_params == 1
    assert count_flops(model).sparse == count_flops(model).dense
    assert count_training_flops(model) == count_training_flops(random)


def test_training_flops_of_a_schedule_are_the_mean_over_the_steps() -> None:
    base = SMALL | {"neuron_balance_coeff": 0.0, "activation_ratio": 0.25}
    scheduled = ModelConfig(
        **base,
        activation_ratio_schedule=[RatioPoint(1, 1.0), RatioPoint(4, 0.5), RatioPoint(7)],
        activation_ratio_curve="steps",
    )
    plain, half, quarter = (
        count_training_flops(ModelConfig(**base | {"activation_ratio": ratio})).sparse for ratio in (1.0, 0.5, 0.25)
    )
    # Three steps at 1, three at 1/2, two at 1/4.
    assert count_training_flops(scheduled, steps=8).sparse == pytest.approx((3 * plain + 3 * half + 2 * quarter) / 8, abs=1)
    assert count_training_flops(scheduled).sparse == quarter


@pytest.mark.parametrize("coefficient", [0.0, 0.001])
def test_the_memory_of_a_schedule_is_that_of_the_step_that_needs_most(coefficient: float) -> None:
    base: dict[str, Any] = SMALL | {"neuron_balance_coeff": coefficient, "moe_ffn_hidden_size": 64}

    def needs(**options: Any) -> int:
        model = ModelConfig(**base | options)
        return estimate_memory(model, ParallelConfig(), ComputeConfig(), micro_batch_size=8, data_parallel_size=1).total

    scheduled = needs(activation_ratio_schedule=[RatioPoint(0, 1.0), RatioPoint(99)])
    assert scheduled == max(needs(activation_ratio=k / 64) for k in range(16, 65))
    by_layer = needs(activation_ratio=0.75, layer_activation_ratios=[1.0, 0.5])
    assert by_layer == (needs(activation_ratio=1.0) + needs(activation_ratio=0.5)) / 2


@pytest.mark.parametrize(("ratio", "splits"), [(0.25, 1), (0.25, 2), (1.0, 1), (0.25, 4), (1 / 16, 3)])
def test_a_plain_moe_of_equal_total_size_has_the_same_total_and_active_expert_weights(ratio: float, splits: int) -> None:
    mone = ModelConfig(**SMALL | {"num_experts": 8, "router_topk": 2, "moe_ffn_hidden_size": 768, "activation_ratio": ratio})
    plain = ModelConfig(
        **SMALL
        | {
            "num_experts": equal_total_experts(8, ratio, splits),
            "router_topk": 2 * splits,
            "moe_ffn_hidden_size": equal_total_width(768, ratio, splits),
            "activation_ratio": 1.0,
        }
    )
    of_mone, of_plain = count_parameters(mone), count_parameters(plain)
    assert of_mone.experts == of_plain.experts
    assert of_mone.active_experts == of_plain.active_experts


def test_sizes_without_an_equal_plain_moe_are_refused() -> None:
    with pytest.raises(ValueError, match=r"equal_total_experts:8,0.125,1: 19\.200 is no number of experts"):
        equal_total_experts(8, 0.125, 1)
    with pytest.raises(ValueError, match=r"equal_total_width:320,0.25,3: 53\.333 is no multiple of 8"):
        equal_total_width(320, 0.25, 3)


def test_the_sweep_of_wider_experts_has_equal_active_widths() -> None:
    assert [equal_active_width(160, ratio) for ratio in (1, 0.5, 0.25, 0.125)] == [160, 240, 320, 384]


@pytest.mark.parametrize("variant", VARIANTS)
def test_active_parameters_are_those_a_token_gets_gradients_from(variant: dict[str, Any]) -> None:
    model = ModelConfig(**SMALL | variant)
    built = build_gpt(model, ParallelConfig(), ComputeConfig(), seed=0)
    # The loss of a single token depends on its active weights. Dropped rows of the gate are read but have no gradient.
    token = torch.tensor([[7]])
    built(token, torch.zeros_like(token), None, labels=token + 1).sum().backward()
    touched = 0
    for name, weight in built.named_parameters():
        if name.endswith("gate_up_weight"):
            assert weight.grad is not None
            up_rows = int((weight.grad[:, 1] != 0).any(-1).sum())
            layer = int(name.split(".layers.")[1].split(".")[0])
            assert up_rows == model.router_topk * model.active_neurons_by_layer[layer]
            touched += up_rows * model.hidden_size + model.router_topk * model.moe_ffn_hidden_size * model.hidden_size
        elif name.endswith("down_weight"):
            assert weight.grad is not None
            touched += int((weight.grad != 0).any(-1).sum()) * model.hidden_size
    of_layers = touched + sum(
        w.numel() for name, w in built.named_parameters() if ".shared_experts." in name or ".router." in name
    )
    counted = count_parameters(model)
    assert counted.active_experts == touched
    per_layer = touched / model.num_layers / (3 * model.hidden_size * model.moe_ffn_hidden_size * model.router_topk)
    assert counted.active_expert_params == pytest.approx(per_layer)
    unchosen = (model.num_experts - model.router_topk) * 3 * model.hidden_size * model.moe_ffn_hidden_size * model.num_layers
    of_a_plain_moe = sum(weight.numel() for name, weight in built.named_parameters() if ".mlp." in name) - unchosen
    assert counted.active_moe_params == pytest.approx(of_layers / of_a_plain_moe)
    assert counted.total - counted.active == counted.experts - counted.active_experts


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_equal_the_flop_counter(variant: dict[str, Any]) -> None:
    model = ModelConfig(**SMALL | variant)
    # The counter does not count our attention operators.
    built = build_gpt(model, ParallelConfig(), ComputeConfig(experts="loop", cpu_kernels="off"), seed=0)
    tokens = torch.randint(0, 50, (3, model.seq_length))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # nor torch's fused attention on CPUs
        loss = built(tokens, torch.arange(model.seq_length).expand(3, -1), None, labels=tokens)
    forward = counter.get_total_flops()
    assert forward == count_flops(model).dense * tokens.numel()
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss.sum().backward()
    # The input of the first layer needs a gradient, since the embedding has weights.
    assert counter.get_total_flops() == 2 * forward


def test_sparse_flops_leave_out_up_and_down_of_dropped_neurons() -> None:
    model, twin = ModelConfig(**SMALL), ModelConfig(**SMALL | {"activation_ratio": 1.0})
    dropped = model.moe_ffn_hidden_size - model.active_neurons
    saved = 2 * 2 * model.hidden_size * dropped * model.router_topk * model.num_layers
    assert count_flops(twin).sparse == count_flops(twin).dense == count_flops(model).dense
    assert count_flops(model).dense - count_flops(model).sparse == saved


@pytest.mark.parametrize(
    ("name", "total"), [("mone_tiny", None), ("mone_small", None), ("mone_925m", 925e6), ("mone_2p8b", 2.81e9)]
)
@pytest.mark.parametrize("ratio", [None, 1.0])
def test_model_configs_build_at_their_size(name: str, total: float | None, ratio: float | None) -> None:
    model = model_config(name)
    model.vocab_size = model.vocab_size or 32000
    model.activation_ratio = ratio or model.activation_ratio
    built = build_gpt(model, ParallelConfig(), ComputeConfig(), seed=0, meta=True)
    assert all(weight.is_meta for weight in built.parameters())
    counted = count_parameters(model)
    assert counted.total == sum(weight.numel() for weight in built.parameters())
    assert counted.active_expert_params == (1.0 if ratio else pytest.approx(0.5))
    assert counted.active_moe_params == 1.0 if ratio else 0.5 < counted.active_moe_params < 1.0
    if total is not None:
        assert counted.total == pytest.approx(total, rel=0.005)
        assert model.shared_expert_ffn_hidden_size > 0


def test_the_readme_has_the_sizes() -> None:
    rows = re.findall(r"\| `(mone_\w+)` \| (\d+) \| (.*) \|", (ROOT / "README.md").read_text())
    assert len(rows) == 4
    for name, vocabulary, cells in rows:
        model = model_config(name)
        model.vocab_size = int(vocabulary)
        counted = count_parameters(model)
        sizes = [f"{counted.total / 1e6:.1f}M", f"{counted.active / 1e6:.1f}M"]
        shares = [f"{counted.active_expert_params:.1%}", f"{counted.active_moe_params:.1%}"]
        assert cells.split(" | ") == [*sizes, f"{model.activation_ratio:g}", *shares]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_memory_equals_that_of_the_engine_after_a_step(precision: str, distributed_optimizer: bool) -> None:
    config = RunConfig(
        model=ModelConfig(**SMALL),
        compute=ComputeConfig(precision=precision),
        parallel=ParallelConfig(distributed_optimizer=distributed_optimizer),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=2),
    )
    engine = MegatronEngine(config, Runtime(0, 1, torch.device("cpu")))
    tokens = torch.randint(0, 50, (2, 17))
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "loss_mask": torch.ones(2, 16)}
    engine.train_step(iter([batch | {"position_ids": torch.arange(16).expand(2, -1)}]), micro_batches=1, accept=always)

    def size(tensors: Iterable[torch.Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    weights = list(engine.modules[0].parameters())
    optimizers = [optimizer.optimizer for optimizer in engine.optimizers()]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    moments = [tensor for state in states for tensor in state.values() if tensor.dim() > 0]
    masters = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
    memory = estimate_memory(config.model, config.parallel, config.compute, micro_batch_size=2, data_parallel_size=1)
    assert memory.weights == size(weights)
    assert memory.gradients == size(weight.main_grad for weight in weights)
    assert memory.optimizer == size(moments) + (size(masters) if precision == "bf16" else 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("variant", "compute"),
    [
        ({}, {}),
        ({}, {"experts": "sparse"}),
        ({"neuron_balance_coeff": 0.1}, {"experts": "sparse"}),
        ({"neuron_balance_coeff": 0.1, "neuron_balance_stride": 4}, {"experts": "sparse"}),
        ({"neuron_balance_coeff": 0.1}, {}),
        ({"neuron_balance_coeff": 0.1, "neuron_balance_stride": 4}, {}),
        ({"activation_ratio": 1.0}, {"experts": "loop"}),
        ({"num_query_groups": 2, "kv_channels": 24}, {}),
        ({"qk_layernorm": False, "hidden_size": 128, "router_topk": 3}, {}),
        ({"shared_expert_ffn_hidden_size": 0, "num_layers": 3}, {}),
        ({"shared_expert_neuron_ratio": 0.25}, {}),
        ({"activation": "gelu"}, {}),
        ({}, {"recompute": "selective"}),
        ({}, {"recompute": "selective", "recompute_modules": ["moe"]}),
        ({}, {"recompute": "selective", "recompute_modules": ["core_attn", "shared_experts"]}),
        ({}, {"recompute": "full"}),
    ],
)
def test_activations_are_what_autograd_keeps(precision: str, variant: dict[str, Any], compute: dict[str, Any]) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "seq_length": 128, "vocab_size": 512, "num_experts": 8}
    neurons = {"moe_ffn_hidden_size": 96, "shared_expert_ffn_hidden_size": 96}
    model = ModelConfig(**TINY_MODEL | sizes | neurons | variant)
    if compute.get("experts") == "sparse" and precision != "fp32":
        pytest.skip("neurons are skipped in fp32 only")
    computed = ComputeConfig(**{"precision": precision, "experts": "grouped"} | compute)
    built = build_gpt(model, ParallelConfig(), computed, seed=0)
    weights = {weight.untyped_storage().data_ptr() for weight in built.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # keeps the storages alive, so that addresses stay unique

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, 512, (2, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = built(tokens, torch.arange(128).expand(2, -1), None, labels=tokens)
    size = sum(storage.nbytes() for storage in kept.values())
    loss.sum().backward()
    memory = estimate_memory(model, ParallelConfig(), computed, micro_batch_size=2, data_parallel_size=1)
    # The formula omits statistics of the norms and targets of the loss.
    assert 0.96 * size < memory.activations < size


def test_messages_of_each_parallel_dimension() -> None:
    model = ModelConfig(**TINY_MODEL)  # D 32, H 32, 4 experts, top 2, 2 layers, 16 tokens per sequence

    def sent(parallel: ParallelConfig, data: int, **compute: Any) -> dict[str, tuple[int, int, int]]:
        found = count_communication(
            model, parallel, ComputeConfig(**compute), micro_batch_size=2, data_parallel_size=data, micro_batches=3
        )
        return {name: (part.ranks, part.span, part.bytes) for name, part in found.items()}

    counted = count_parameters(model)
    assert sent(ParallelConfig(), 1) == {}
    # fp32 gradients reduced to their owners, and new weights gathered: 4 + 4 bytes of each weight, to one of two ranks.
    dense, experts = 4 * (counted.total - counted.experts), 4 * counted.experts
    assert sent(ParallelConfig(), 2) == {"data": (2, 2, dense), "expert data": (2, 2, experts)}
    # 3 x 2 x 16 tokens, each to 2 experts, half of which are on the other rank; 32 fp32 numbers, sent and returned,
    # forward and backward, in 2 layers.
    rows = 3 * 2 * 16 * 2 // 2 * 32 * 4 * 4 * 2
    assert sent(ParallelConfig(expert=2), 2) == {"data": (2, 2, dense), "expert": (2, 2, rows)}
    assert sent(ParallelConfig(expert=2), 2, recompute="full")["expert"] == (2, 2, rows * 3 // 2)
    assert sent(ParallelConfig(expert=2), 4)["expert data"] == (2, 4, experts // 2)
    # The residual stream is sent to the next stage, and its gradient is returned.
    assert sent(ParallelConfig(pipeline=2), 1)["pipeline"] == (2, 2, 2 * 3 * 2 * 16 * 32 * 4)
    assert sent(ParallelConfig(tensor=2), 1)["tensor"] == (2, 2, (2 * 2 * 5 + 2) * 3 * 2 * 16 * 32 * 4 // 2)


def test_memory_falls_with_every_kind_of_sharding_and_with_recomputation() -> None:
    model = model_config("mone_2p8b")

    def total(parallel: ParallelConfig, compute: ComputeConfig, data_parallel_size: int) -> int:
        return estimate_memory(model, parallel, compute, micro_batch_size=1, data_parallel_size=data_parallel_size).total

    plain = total(ParallelConfig(distributed_optimizer=False), ComputeConfig(), 8)
    assert total(ParallelConfig(), ComputeConfig(), 8) < plain
    assert total(ParallelConfig(expert=8), ComputeConfig(), 8) < total(ParallelConfig(), ComputeConfig(), 8)
    assert total(ParallelConfig(tensor=2), ComputeConfig(), 4) < plain
    assert total(ParallelConfig(distributed_optimizer=False), ComputeConfig(recompute="full"), 8) < plain
