from collections.abc import Sequence
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from mone_model.activations import ACTIVATIONS
from mone_model.config import EXPERT_BACKENDS, NEURON_BALANCE_FORMS, ComputeConfig, ModelConfig, ParallelConfig
from mone_model.expert_backends import expert_gemm_loop
from mone_model.kernels.cpu import experts as cpu
from mone_model.megatron import versions
from mone_model.megatron.experts import NeuronExperts
from mone_model.megatron.gpt import build_gpt, moe_layers
from mone_model.megatron.transformer_config import transformer_config
from mone_model.neuron_balance import Balance, neuron_sizes
from mone_model.neuron_selection import select_and_gate_reference, unpack
from mone_model.thresholds import AtLeast
from tests.tiny import TINY_MODEL

pytestmark = pytest.mark.usefixtures("one_process")
TOKENS = torch.tensor([5, 0, 9, 2])
WIDTH, NEURONS = 16, 24


def make_experts(
    *, k: int, activation: str = "silu", backend: str = "grouped", balance: float = 0.0, reads: Balance | None = None
) -> NeuronExperts:
    model = ModelConfig(
        hidden_size=WIDTH, moe_ffn_hidden_size=NEURONS, num_experts=len(TOKENS), activation=activation, vocab_size=8
    )
    config = transformer_config(model, ParallelConfig(), ComputeConfig())
    groups: ProcessGroupCollection = get_default_pg_collection()
    options: dict[str, Any] = {"activation": activation, "backend": backend, "balance_coeff": balance, "balance": reads}
    experts = NeuronExperts(len(TOKENS), config, groups, active_neurons=k, **options)
    generator = torch.Generator().manual_seed(3)
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.4, generator=generator)
    return experts


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    count = int(TOKENS.sum())
    return torch.randn(count, WIDTH, generator=generator), torch.rand(count, generator=generator)


def outputs_and_gradients(module: torch.nn.Module, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    x_ND, probs_N = rows()
    x_ND.requires_grad_()
    probs_N.requires_grad_()
    out_ND, _ = module(x_ND, TOKENS, probs_N)
    target = torch.randn(out_ND.shape, generator=torch.Generator().manual_seed(6))
    gradients = torch.autograd.grad((out_ND * target).sum(), [x_ND, probs_N, *weights])
    return [out_ND.detach(), *gradients]


def assert_relative(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert (actual - expected).norm() <= relative * expected.norm()


def per_token(experts: NeuronExperts, k: int) -> list[torch.Tensor]:
    """The definition: a loop over tokens and neurons in float64."""
    gate_up = experts.gate_up_weight.detach().double().requires_grad_()
    down = experts.down_weight.detach().double().requires_grad_()
    x_ND, probs_N = (tensor.double().requires_grad_() for tensor in rows())
    expert_of = torch.arange(len(TOKENS)).repeat_interleave(TOKENS).tolist()
    outs = []
    for x, prob, e in zip(x_ND, probs_N, expert_of, strict=True):
        gates = [experts.config.activation_func(gate_up[e, 0, j] @ x) for j in range(NEURONS)]
        best = sorted(range(NEURONS), key=lambda j: (-float(gates[j].detach().abs()), j))[:k]
        outs.append(prob * sum((gates[j] * (gate_up[e, 1, j] @ x) * down[e, j] for j in best), torch.zeros(WIDTH)))
    out_ND = torch.stack(outs)
    target = torch.randn(out_ND.shape, generator=torch.Generator().manual_seed(6)).double()
    gradients = torch.autograd.grad((out_ND * target).sum(), [x_ND, probs_N, gate_up, down])
    return [tensor.float() for tensor in (out_ND.detach(), *gradients)]


@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_a_quarter_of_the_neurons_equals_a_loop_over_tokens(activation: str, backend: str) -> None:
    experts = make_experts(k=NEURONS // 4, activation=activation, backend=backend)
    ours = outputs_and_gradients(experts, list(experts.parameters()))
    for actual, expected in zip(ours, per_token(experts, NEURONS // 4), strict=True):
        assert_relative(actual, expected, 1e-6)


@pytest.mark.parametrize("backend", [name for name in EXPERT_BACKENDS if name != "loop"])
@pytest.mark.parametrize("balance", [0.0, 0.1])
@pytest.mark.parametrize("k", [NEURONS, NEURONS // 4, 1])
def test_every_backend_equals_the_loop_over_experts(k: int, balance: float, backend: str) -> None:
    results, counted = [], []
    for each in (backend, "loop"):
        experts = make_experts(k=k, backend=each, balance=balance)
        experts.counting_neurons = True
        results.append(outputs_and_gradients(experts, list(experts.parameters())))
        counters = experts.counters
        assert counters is not None
        counted.append((counters.tokens_E, counters.selected_EH, counters.magnitude_EH, counters.threshold_E))
    for fast, loop in zip(*results, strict=True):
        assert_relative(fast, loop, 1e-6)
    for fast, loop in zip(*counted, strict=True):
        torch.testing.assert_close(fast, loop, rtol=1e-6, atol=1e-6)  # the smallest gates are differences of larger numbers


@pytest.mark.parametrize("backend", [name for name in EXPERT_BACKENDS if name != "loop"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("reads", [Balance(form, stride) for form in NEURON_BALANCE_FORMS for stride in (1, 2, 3)], ids=str)
def test_the_balance_loss_is_the_same_by_every_backend(reads: Balance, activation: str, backend: str) -> None:
    results = []
    for each in (backend, "loop"):
        experts = make_experts(k=6, activation=activation, backend=each, balance=1000.0, reads=reads)
        results.append(
            [*outputs_and_gradients(experts, list(experts.parameters())), experts.record.sums["neuron_balance_loss"]]
        )
    without = make_experts(k=6, activation=activation)
    change = outputs_and_gradients(without, list(without.parameters()))[3] - results[1][3]
    assert change.norm() > 0.1 * results[1][3].norm()
    for fast, loop in zip(*results, strict=True):
        assert_relative(fast, loop, 2e-6)


@pytest.mark.parametrize(
    ("tokens", "width", "neurons", "k"),
    [
        ([383, 0, 1, 384, 700], 16, 8, 3),  # the longest block, blocks that share an expert
        ([3, 200], 144, 72, 18),  # pieces of unequal width, an odd tile
        ([70], 256, 200, 199),
        ([64, 128], 48, 1000, 1),
    ],
)
@pytest.mark.parametrize("reads", [None, Balance(), Balance("unmasked", 3), Balance("masked", 2)], ids=str)
def test_sparse_equals_the_loop_for_all_shapes(
    reads: Balance | None, tokens: list[int], width: int, neurons: int, k: int
) -> None:
    generator = torch.Generator().manual_seed(sum(tokens))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    tokens_E = torch.tensor(tokens)
    rows, experts = sum(tokens), len(tokens)
    x_ND, gate_up, down = random(rows, width), random(experts, 2, neurons, width), random(experts, neurons, width)
    probs_N = torch.rand(rows, generator=generator).requires_grad_()
    leaves = [x_ND, gate_up, down, probs_N]
    computed = cpu.experts(x_ND, gate_up, down, probs_N, tokens_E, k, "silu", counting=False, balance=reads)
    out = computed.out_ND
    gate_NH, up_NH = expert_gemm_loop(x_ND, gate_up.flatten(1, 2).transpose(1, 2), tokens_E).chunk(2, dim=-1)
    selected = select_and_gate_reference(gate_NH, up_NH, probs_N, k)
    expected = expert_gemm_loop(selected.hidden_NH, down, tokens_E)
    target = random(rows, width).detach()
    losses = [(out * target).sum(), (expected * target).sum()]
    if reads:
        mask_NH = unpack(selected.masks_NW, neurons)
        sizes_EH = neuron_sizes(torch.nn.functional.silu(gate_NH), mask_NH, tokens_E, reads)
        assert_relative(computed.sizes_EH, sizes_EH, 1e-6)
        weights_EH = random(experts, neurons).detach() * losses[1].detach().abs() / sizes_EH.detach().norm()
        losses = [losses[0] + (computed.sizes_EH * weights_EH).sum(), losses[1] + (sizes_EH * weights_EH).sum()]
    gradients = zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True)
    for actual, right in [(out, expected), *gradients]:
        assert_relative(actual, right, 3e-6)


@pytest.mark.parametrize("frozen", [None, "gate_up_weight", "down_weight"])
@pytest.mark.parametrize("balance", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["loop", "sparse"])
def test_gradients_accumulate_over_micro_batches_and_are_reset(backend: str, balance: float, frozen: str | None) -> None:
    experts = make_experts(k=6, backend=backend, balance=balance)
    twin = make_experts(k=6, balance=balance)
    names, of_twin = zip(*twin.named_parameters(), strict=True)
    gradients = dict(zip(names, outputs_and_gradients(twin, of_twin)[3:], strict=True))
    if frozen:
        experts.get_parameter(frozen).requires_grad_(False)
    ddp = DistributedDataParallel(experts.config, DistributedDataParallelConfig(), experts)
    for micro_batches in (3, 1, 2):
        ddp.zero_grad_buffer()
        for _ in range(micro_batches):
            x_ND, probs_N = rows()
            out_ND, _ = ddp(x_ND.requires_grad_(), TOKENS, probs_N)
            out_ND.backward(torch.randn(out_ND.shape, generator=torch.Generator().manual_seed(6)))
        ddp.finish_grad_sync()
        for name, weight in experts.named_parameters():
            if name != frozen:
                assert_relative(weight.main_grad, micro_batches * gradients[name], 2e-6)


def test_experts_do_not_train_by_thresholds() -> None:
    experts = make_experts(k=6, backend="sparse")
    experts.rule = AtLeast(0.1)
    with pytest.raises(AssertionError, match="inference"):
        experts(rows()[0], TOKENS, rows()[1])


def test_skipping_is_a_proper_operator_of_torch() -> None:
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((7, 16), (3, 2, 24, 16), (3, 24, 16), (7,))]
    offsets = torch.tensor([0, 2, 2, 7])
    for counting, form, stride in ((True, 0, 1), (False, 1, 1), (False, 3, 2)):
        torch.library.opcheck(torch.ops.mone.experts.default, (*leaves, offsets, None, 5, 0, counting, form, stride))


def test_ratio_one_equals_megatron_cores_own_experts() -> None:
    experts = make_experts(k=NEURONS)
    spec = get_gpt_layer_local_spec(num_experts=len(TOKENS))
    submodules = versions.submodules_of(versions.submodules_of(spec.submodules.mlp).experts)
    theirs = SequentialMLP(len(TOKENS), experts.config, submodules, get_default_pg_collection())
    with torch.no_grad():
        for index, mlp in enumerate(theirs.local_experts):
            mlp.linear_fc1.weight.copy_(experts.gate_up_weight[index].flatten(0, 1))
            mlp.linear_fc2.weight.copy_(experts.down_weight[index].T)
    fc1 = [mlp.linear_fc1.weight for mlp in theirs.local_experts]
    fc2 = [mlp.linear_fc2.weight for mlp in theirs.local_experts]
    expected = outputs_and_gradients(theirs, fc1 + fc2)
    actual = outputs_and_gradients(experts, list(experts.parameters()))
    for ours, other in zip(actual[:3], expected[:3], strict=True):
        assert_relative(ours, other, 1e-6)
    count = len(TOKENS)
    assert_relative(actual[3].flatten(1, 2), torch.stack(expected[3 : 3 + count]), 1e-6)
    assert_relative(actual[4], torch.stack(expected[3 + count :]).mT, 1e-6)


def test_ratio_one_selects_nothing_and_changes_no_bit() -> None:
    experts = make_experts(k=NEURONS)

    class Plain(torch.nn.Module):
        def forward(self, x_ND: torch.Tensor, tokens_E: torch.Tensor, probs_N: torch.Tensor) -> tuple[torch.Tensor, None]:
            gate_up_EDH = experts.gate_up_weight.flatten(1, 2).transpose(1, 2)
            offsets_E = tokens_E.cumsum(0).int()
            gate_NH, up_NH = torch.nn.functional.grouped_mm(x_ND, gate_up_EDH, offs=offsets_E).chunk(2, dim=-1)
            hidden_NH = torch.nn.functional.silu(gate_NH) * up_NH * probs_N[:, None]
            return torch.nn.functional.grouped_mm(hidden_NH, experts.down_weight, offs=offsets_E), None

    for ours, other in zip(
        outputs_and_gradients(experts, list(experts.parameters())),
        outputs_and_gradients(Plain(), list(experts.parameters())),
        strict=True,
    ):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
def test_an_expert_rank_without_tokens_keeps_its_weights_in_the_graph(backend: str) -> None:
    experts = make_experts(k=6, balance=0.1, backend=backend)
    experts.counting_neurons = True
    x_ND = torch.empty(0, WIDTH, requires_grad=True)
    out_ND, _ = experts(x_ND, torch.zeros(len(TOKENS), dtype=torch.long), torch.empty(0))
    out_ND.sum().backward()
    for weight in experts.parameters():
        assert weight.grad is not None
        assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("recompute", "score"),
    [
        *((recompute, "abs_gate") for recompute in ("none", "core_attn", "moe", "shared_experts", "full")),
        ("moe", "random"),
        ("full", "random"),
    ],
)
def test_recomputation_counts_each_token_once_and_changes_no_gradient(recompute: str, score: str) -> None:
    model = ModelConfig(**TINY_MODEL, neuron_balance_coeff=0.1, z_loss_coeff=0.01, neuron_score=score)

    def train_once(compute: ComputeConfig) -> tuple[list[Any], list[torch.Tensor]]:
        torch.manual_seed(0)
        gpt = build_gpt(model, ParallelConfig(), compute, seed=1)
        for _, experts, _ in moe_layers(gpt):
            experts.counting_neurons = True
        tokens_BS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
        gpt(tokens_BS, torch.arange(16).expand(2, -1), None, labels=tokens_BS).mean().backward()
        noted: list[Any] = []
        for _, experts, router in moe_layers(gpt):
            assert experts.counters is not None
            sums = (router.record.sums["z_loss"].item(), experts.record.sums["neuron_balance_loss"].item())
            counts = (experts.record.counts, router.record.counts)
            noted.append((experts.counters.tokens_E.tolist(), experts.counters.selected_EH.tolist(), sums, counts))
        return noted, [weight.grad for weight in gpt.parameters() if weight.grad is not None]

    if recompute in ("none", "full"):
        compute = ComputeConfig(recompute=recompute)
    else:
        compute = ComputeConfig(recompute="selective", recompute_modules=[recompute])
    expected_notes, expected_gradients = train_once(ComputeConfig())
    notes, gradients = train_once(compute)
    assert notes == expected_notes
    assert sum(notes[0][0]) == 2 * 16 * model.router_topk
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
