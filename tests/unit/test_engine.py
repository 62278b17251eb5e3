"""The engine in one process: schedules, precision, routing options."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mone_model.config import ComputeConfig, ModelConfig
from mone_model.megatron.experts import SharedNeuronExpert
from mone_model.megatron.gpt import moe_layers
from mone_model.neuron_selection import select_neurons_reference
from mone_model.neuron_stats import reduce_counters
from tests.tiny import TINY_MODEL, always
from train.config import RunConfig
from train.config_sections import DeepSpeedConfig, GuardConfig, OptimizerConfig, TrainingConfig
from train.engines import build_engine
from train.engines.megatron import MegatronEngine
from train.guards import StepGuard
from train.runtime import Runtime, set_seeds
from train.sources import Batch

pytestmark = pytest.mark.usefixtures("one_process")


def make_engine(
    model: dict[str, Any] | None = None, optimizer: dict[str, Any] | None = None, **compute: Any
) -> MegatronEngine:
    config = RunConfig(
        model=ModelConfig(**TINY_MODEL | (model or {})),
        compute=ComputeConfig(**compute),
        training=TrainingConfig(steps=20, micro_batch_size=4, global_batch_size=4),
        optimizer=OptimizerConfig(**{"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 4} | (optimizer or {})),
    )
    set_seeds(1)
    return MegatronEngine(config, Runtime(0, 1, torch.device("cpu")))


def counting_batches() -> Iterator[Batch]:
    """Sequences that count upwards, which are easy to learn."""
    generator = torch.Generator().manual_seed(0)
    while True:
        first = torch.randint(0, 64, (4, 1), generator=generator)
        counted = (first + torch.arange(17)) % 64
        yield {
            "tokens": counted[:, :-1].contiguous(),
            "labels": counted[:, 1:].contiguous(),
            "loss_mask": torch.ones(4, 16),
            "position_ids": torch.arange(16).expand(4, -1),
        }


def train(engine: MegatronEngine, steps: int) -> list[Any]:
    batches = counting_batches()
    return [engine.train_step(batches, micro_batches=1, accept=always) for _ in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_learns_in_either_precision(precision: str) -> None:
    engine = make_engine(precision=precision)
    losses = [result.loss for result in train(engine, 20)]
    assert losses[0] == pytest.approx(4.16, abs=0.1)
    assert losses[-1] < 3.0
    weight = next(engine.modules[0].parameters())
    assert weight.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_loss_is_over_the_tokens_of_the_vocabulary_and_not_its_padding(tied: bool, precision: str) -> None:
    gpt = make_engine({"vocab_size": 100, "vocab_multiple": 64, "tie_embeddings": tied}, precision=precision).modules[0]
    weight_VD = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
    assert len(weight_VD) == 128
    hidden: list[torch.Tensor] = []
    gpt.output_layer.register_forward_pre_hook(lambda layer, inputs: hidden.append(inputs[0].detach()))
    tokens_BS = torch.randint(0, 100, (2, 17), generator=torch.Generator().manual_seed(0))
    inputs = tokens_BS[:, :-1].contiguous(), torch.arange(16).expand(2, -1), None
    labels_BS = tokens_BS[:, 1:].contiguous()
    losses_BS = gpt(*inputs, labels=labels_BS)
    used_VD = weight_VD.detach()[:100].clone().requires_grad_()
    logits_SBV = hidden[0] @ used_VD.T
    expected_BS = torch.nn.functional.cross_entropy(logits_SBV.float().permute(1, 2, 0), labels_BS, reduction="none")
    relative = 1e-6 if precision == "fp32" else 2**-8
    torch.testing.assert_close(losses_BS.float(), expected_BS, rtol=relative, atol=0)
    if not tied:  # whose gradient is also that of the embedding
        (expected_VD,) = torch.autograd.grad(expected_BS.sum(), used_VD)
        losses_BS.sum().backward()
        gradient_VD = weight_VD.main_grad
        torch.testing.assert_close(gradient_VD[:100], expected_VD.float(), rtol=relative, atol=relative)
    else:
        losses_BS.sum().backward()
    assert weight_VD.main_grad[:100].any()
    assert not weight_VD.main_grad[100:].any()
    logits_BSV = gpt(*inputs)
    torch.testing.assert_close(logits_BSV[..., :100], logits_SBV.transpose(0, 1), rtol=relative, atol=relative)
    assert not logits_BSV.softmax(-1)[..., 100:].any()


def test_attention_is_causal() -> None:
    gpt = make_engine().modules[0].eval()
    tokens_BS = torch.arange(16)[None]
    changed_BS = tokens_BS.clone()
    changed_BS[0, 10] = 50
    positions_BS = torch.arange(16)[None]
    with torch.no_grad():
        before, after = (gpt(tokens, positions_BS, None)[0] for tokens in (tokens_BS, changed_BS))
    # Not bit-equal: the changed token is routed to other experts, which changes the number of rows of their GEMMs.
    torch.testing.assert_close(before[:10], after[:10], rtol=0, atol=1e-6)
    assert ((before[10:] - after[10:]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {2: 5e-3, 4: 1e-2, 12: 5.5e-3, 20: 1e-3}),
        ("linear", {2: 5e-3, 4: 1e-2, 12: 5.5e-3, 20: 1e-3}),
        ("wsd", {2: 5e-3, 4: 1e-2, 12: 1e-2, 18: 5.5e-3, 20: 1e-3}),
        ("constant", {2: 5e-3, 4: 1e-2, 12: 1e-2, 20: 1e-2}),
    ],
)
def test_learning_rate_follows_its_schedule(schedule: str, expected: dict[int, float]) -> None:
    engine = make_engine(optimizer={"schedule": schedule, "wsd_decay_steps": 4})
    rates = [result.learning_rate for result in train(engine, 20)]
    assert {step: rates[step - 1] for step in expected} == pytest.approx(expected)


def test_clipping_bounds_the_update_but_not_the_reported_norm() -> None:
    norms, updates = {}, {}
    for clip in (0.0, 0.1, 100.0):
        engine = make_engine(optimizer={"clip_grad": clip})
        norms[clip] = train(engine, 1)[0].grad_norm
        states = [state for optimizer in engine.optimizers() for state in optimizer.optimizer.state.values()]
        first_moment = torch.cat([state["exp_avg"].flatten() for state in states]).norm().item()
        updates[clip] = first_moment / (1 - OptimizerConfig().beta1)
    assert norms[0.1] > 0.5
    # Without clipping the optimizer does not compute the norm, but it must be reported.
    assert list(norms.values()) == pytest.approx([norms[0.1]] * 3)
    assert updates == pytest.approx({0.0: norms[0.0], 0.1: 0.1, 100.0: norms[0.0]}, rel=1e-5)


@pytest.mark.parametrize("engine_name", ["megatron", "deepspeed"])
def test_weight_decay_applies_to_matrices_and_not_to_norms(engine_name: str) -> None:
    weights: dict[float, dict[str, torch.Tensor]] = {}
    for weight_decay in (0.0, 0.5):
        config = RunConfig(
            engine=engine_name,
            deepspeed=DeepSpeedConfig(zero_stage=1),
            model=ModelConfig(**TINY_MODEL),
            compute=ComputeConfig(experts="grouped"),
            training=TrainingConfig(steps=200, micro_batch_size=4, global_batch_size=4),
            optimizer=OptimizerConfig(lr=1e-2, weight_decay=weight_decay),
        )
        set_seeds(1)
        engine = build_engine(config, Runtime(0, 1, torch.device("cpu")))
        engine.train_step(counting_batches(), micro_batches=1, accept=always)
        weights[weight_decay] = {name: weight.detach() for name, weight in engine.modules[0].named_parameters()}
    decayed = {name for name, weight in weights[0.0].items() if not torch.equal(weight, weights[0.5][name])}
    assert decayed == {name for name, weight in weights[0.0].items() if weight.dim() > 1}
    assert {"embedding.word_embeddings.weight", "output_layer.weight", "decoder.layers.0.mlp.router.weight"} <= decayed
    assert "decoder.final_layernorm.weight" in weights[0.0].keys() - decayed


def test_experts_without_a_backward_pass_have_no_stale_gradient() -> None:
    engine = make_engine({"activation_ratio": 0.25}, experts="sparse")
    train(engine, 1)
    layers = [experts for _, experts, _ in moe_layers(engine.modules[0])]

    def have_gradients() -> list[list[bool]]:
        return [[bool(weight.main_grad.any()) for weight in experts.parameters()] for experts in layers]

    assert have_gradients() == [[True, True], [True, True]]
    engine.modules[0].decoder.layers[1].mlp.forward = lambda x_SBD, **_: (torch.zeros_like(x_SBD), None)
    train(engine, 1)
    assert have_gradients() == [[True, True], [False, False]]


@pytest.mark.parametrize(
    "options",
    [
        {"router_score_function": "sigmoid"},
        {"router_score_function": "sigmoid", "router_scaling_factor": 2.5, "router_topk": 1},
        {"router_pre_softmax": True, "router_topk": 1},
        {"seq_aux_loss_coeff": 0.01, "aux_loss_coeff": 0.0},
        {"global_aux_loss_coeff": 0.01, "z_loss_coeff": 0.001},
        {"aux_loss_coeff": 0.0},
        {"shared_expert_ffn_hidden_size": 0},
        {"activation": "relu_squared", "neuron_balance_coeff": 0.01, "neuron_balance_form": "masked"},
    ],
)
def test_learns_with_every_kind_of_routing(options: dict[str, Any]) -> None:
    assert train(make_engine(options), 15)[-1].loss < 3.6


def test_expert_bias_rises_for_idle_experts_and_falls_for_busy_ones() -> None:
    engine = make_engine(
        {"router_score_function": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 0.01, "aux_loss_coeff": 0.0}
    )
    layers = list(moe_layers(engine.modules[0]))
    for _, experts, _ in layers:
        experts.counting_neurons = True
    train(engine, 1)
    for _, experts, router in layers:
        assert experts.counters is not None
        fair = experts.counters.tokens_E.mean()
        expected = 0.01 * torch.sign(fair - experts.counters.tokens_E)
        torch.testing.assert_close(router.expert_bias.double(), expected, check_dtype=False)


@pytest.mark.parametrize("compute", [{"experts": "sparse"}, {"experts": "grouped"}, {"precision": "bf16"}], ids=str)
def test_training_is_the_same_without_the_cpu_kernels(compute: dict[str, Any]) -> None:
    on = train(make_engine(**compute), 5)
    off = train(make_engine(**compute | {"experts": "grouped", "cpu_kernels": "off"}), 5)
    relative = 2**-8 if "precision" in compute else 1e-5
    assert [result.loss for result in off] == pytest.approx([result.loss for result in on], rel=relative)
    assert [result.grad_norm for result in off] == pytest.approx([result.grad_norm for result in on], rel=10 * relative)


@pytest.mark.parametrize("cpu_kernels", ["auto", "off"])
@pytest.mark.parametrize("model", [{}, {"neuron_balance_coeff": 0.01}, {"shared_expert_neuron_ratio": 0.5}], ids=str)
@pytest.mark.parametrize("compute", [{"experts": "loop"}, {"experts": "sparse"}, {"precision": "bf16"}], ids=str)
def test_a_nan_token_drops_one_step(cpu_kernels: str, model: dict[str, Any], compute: dict[str, Any]) -> None:
    if cpu_kernels == "off" and compute == {"experts": "sparse"}:
        pytest.skip("they are kernels")
    engine = make_engine(model, **{"experts": "grouped", "cpu_kernels": cpu_kernels} | compute)
    weights = engine.modules[0].state_dict()
    before = {name: weight.clone() for name, weight in weights.items() if torch.is_tensor(weight)}
    word = engine.modules[0].embedding.word_embeddings.weight.data[5]
    healthy = word.clone()
    word.fill_(torch.nan)
    guard = StepGuard(GuardConfig(), torch.device("cpu"))
    result = engine.train_step(counting_batches(), micro_batches=1, accept=functools.partial(guard.accepts, 1))
    assert not result.applied
    word.copy_(healthy)
    assert all(torch.equal(weights[name], weight) for name, weight in before.items())
    assert train(engine, 1)[0].applied


def casts(gpt: torch.nn.Module) -> set[str]:
    """The buffers of a model that are in bf16."""
    return {name for name, buffer in gpt.named_buffers() if buffer.dtype == torch.bfloat16}


@pytest.mark.parametrize("engine_name", ["megatron", "deepspeed"])
def test_tokens_are_counted_exactly_in_bf16(engine_name: str) -> None:
    # In bf16 counts above 256 are even, and above 2048 multiples of 16.
    routing = {"router_score_function": "sigmoid", "expert_bias": True, "global_aux_loss_coeff": 0.01}
    config = RunConfig(
        engine=engine_name,
        deepspeed=DeepSpeedConfig(zero_stage=1),
        model=ModelConfig(**TINY_MODEL | routing | {"seq_length": 413}),
        compute=ComputeConfig(precision="bf16", experts="grouped"),
        training=TrainingConfig(steps=200, micro_batch_size=4, global_batch_size=12),
    )
    set_seeds(1)
    engine = build_engine(config, Runtime(0, 1, torch.device("cpu")))
    routers = [router for *_, router in moe_layers(engine.modules[0])]
    chosen: dict[Any, list[torch.Tensor]] = {router: [] for router in routers}
    counted: dict[Any, list[list[torch.Tensor]]] = {router: [] for router in routers}

    def follow(router: Any, inputs: Any, output: Any) -> None:
        chosen[router].append(output[1].sum(0))
        counts = router.local_tokens_per_expert, router.global_tokens_per_expert, router.ga_steps
        counted[router].append([count.clone() for count in counts])

    for router in routers:
        router.register_forward_hook(follow)
    tokens = torch.randint(0, 64, (3, 4, 414), generator=torch.Generator().manual_seed(0))
    batch = {"loss_mask": torch.ones(4, 413), "position_ids": torch.arange(413).expand(4, -1)}
    batches = [batch | {"tokens": part[:, :-1].contiguous(), "labels": part[:, 1:].contiguous()} for part in tokens]
    engine.train_step(iter(batches), micro_batches=3, accept=always)
    assert casts(engine.modules[0]) == set()
    for router in routers:
        counts_3E = torch.stack(chosen[router]).cumsum(0)
        assert counts_3E[-1].max() > 2048
        assert (counts_3E[-1] % 16 != 0).any()
        for step, (local_E, global_E, steps) in enumerate(counted[router]):
            assert local_E.tolist() == global_E.tolist() == counts_3E[step].tolist()
            assert steps == step + 1
        expected_E = config.model.expert_bias_update_rate * torch.sign(counts_3E[-1].float().mean() - counts_3E[-1])
        assert torch.equal(router.expert_bias, expected_E)


def test_capacity_drops_tokens_of_busy_experts() -> None:
    engine = make_engine({"expert_capacity_factor": 0.5})
    layers = list(moe_layers(engine.modules[0]))
    for _, experts, _ in layers:
        experts.counting_neurons = True
    train(engine, 1)
    counters = {layer: experts.counters for layer, experts, _ in layers if experts.counters is not None}
    usage = reduce_counters(counters, num_layers=2, num_experts=4, num_neurons=32)
    fair = 4 * 16 * 2 / 4
    assert usage.tokens_LE.max() == fair / 2


def test_the_shared_expert_selects_its_own_neurons() -> None:
    dense, sparse = make_engine().modules[0], make_engine({"shared_expert_neuron_ratio": 0.25}).modules[0]
    layer, twin = sparse.decoder.layers[0].mlp.shared_experts, dense.decoder.layers[0].mlp.shared_experts
    assert isinstance(layer, SharedNeuronExpert)
    assert not isinstance(twin, SharedNeuronExpert)
    x_SBD = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(0))
    gate_up = x_SBD.flatten(0, 1) @ layer.linear_fc1.weight.T
    gate, up = gate_up.chunk(2, dim=-1)
    gate = torch.nn.functional.silu(gate)
    kept = select_neurons_reference(gate, 8).mask_NH
    expected = (gate * kept * up) @ layer.linear_fc2.weight.T
    torch.testing.assert_close(layer(x_SBD).flatten(0, 1), expected)
    assert not torch.allclose(twin(x_SBD).flatten(0, 1), expected)
