"""The operators of the CPU kernels: schemas and fake tensors match the kernels; invalid arguments are refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mone_model.kernels.cpu import attention, experts, library, selection

pytestmark = pytest.mark.skipif(not library.available(), reason="no C++ compiler")

ROWS, EXPERTS, WIDTH, NEURONS, K, WORDS = 6, 3, 32, 20, 5, 2


def arguments() -> dict[str, dict[str, Any]]:
    """Valid arguments of each operator, by name and in order."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    gate, up, probs = random(ROWS, 2 * NEURONS)[:, :NEURONS], random(ROWS, NEURONS), random(ROWS).abs()
    weights = {"gate_up": random(EXPERTS, 2, NEURONS, WIDTH), "down": random(EXPERTS, NEURONS, WIDTH)}
    x, offsets = random(ROWS, WIDTH), torch.tensor([0, 4, 4, ROWS])
    balanced = {"all_gates": random(ROWS, NEURONS), "dsizes": random(EXPERTS, NEURONS)}
    _, masks, gates, ups, *_ = torch.ops.mone.experts(x, *weights.values(), probs, offsets, None, K, 0, False, 0, 1)
    selected = selection.select_and_gate(gate, up, probs, K, "silu")
    q, k, v = random(7, 2, 4, 12), random(7, 2, 2, 16)[..., :12], random(7, 2, 2, 12)
    context, logsumexp = torch.ops.mone.attend(q, k, v)
    saved = dict(zip(("masks", "gates", "ups"), selected[1:4], strict=True))
    rows = {"x": x, **weights, "probs": probs, "offsets": offsets}
    saved_of_experts = {"masks": masks, "gates": gates, "ups": ups}
    gradients = {"dgate_up": random(EXPERTS, 2, NEURONS, WIDTH), "ddown": random(EXPERTS, NEURONS, WIDTH)}
    few = {"x": x, **weights, "probs": probs, "tokens": torch.tensor([4, 0, 2])}
    bias = random(EXPERTS, NEURONS).abs()
    qkv = {"q": q, "k": k, "v": v}
    saved_of_attend = {"context": context, "logsumexp": logsumexp}
    return {
        "select_and_gate_cpu": {"gate": gate, "up": up, "probs": probs, "k": K, "activation": 0},
        "select_and_gate_backward_cpu": {"dhidden": random(ROWS, NEURONS), **saved, "probs": probs, "activation": 0},
        "experts": {**rows, "bias": bias, "k": K, "activation": 1, "counting": True, "form": 1, "stride": 1},
        "experts_backward": {
            **gradients, "add": True, "dy": random(ROWS, WIDTH), **rows, **saved_of_experts, **balanced, "activation": 0,
            "form": 2, "stride": 1,
        },
        "decode": {**few, "bias": bias, "k": K, "threshold": None, "activation": 3},
        "attend": qkv,
        "attend_backward": {"dcontext": random(*q.shape), **qkv, **saved_of_attend},
    }  # fmt: skip


def test_operators_are_what_their_schemas_and_fake_tensors_say() -> None:
    for name, values in arguments().items():
        differentiable = name in ("experts", "attend")
        for value in values.values():
            if differentiable and isinstance(value, torch.Tensor) and value.is_floating_point():
                value.requires_grad_()
        torch.library.opcheck(getattr(torch.ops.mone, name).default, tuple(values.values()))
    torch.library.opcheck(torch.ops.mone.decode.default, tuple({**arguments()["decode"], "threshold": 0.3}.values()))


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in column-major order."""
    return tensor.mT.contiguous().mT


WRONG: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("select_and_gate_cpu", "gate", torch.Tensor.double, "gate must be float32 or bfloat16; it is Double"),
    ("select_and_gate_cpu", "gate", torch.Tensor.flatten, "gate must have 2 dimensions"),
    ("select_and_gate_cpu", "gate", transposed, "with contiguous rows"),
    ("select_and_gate_cpu", "up", torch.Tensor.bfloat16, r"up must be a float32 tensor.*it is BFloat16"),
    ("select_and_gate_cpu", "up", lambda up: up[:, 1:], rf"shape \[{ROWS}, {NEURONS}\].*of shape \[{ROWS}, {NEURONS - 1}\]"),
    ("select_and_gate_cpu", "probs", lambda probs: probs[::2], "probs must be"),
    ("select_and_gate_cpu", "k", lambda _: 0, f"k must be from 1 to the number of neurons, {NEURONS}; it is 0"),
    ("select_and_gate_cpu", "k", lambda _: NEURONS + 1, "k must be from 1"),
    ("select_and_gate_cpu", "activation", lambda _: 5, "no activation number 5"),
    ("select_and_gate_backward_cpu", "dhidden", transposed, "dhidden must be"),
    ("select_and_gate_backward_cpu", "masks", torch.Tensor.int, "masks must be a int16 tensor"),
    ("select_and_gate_backward_cpu", "ups", lambda ups: ups[1:], "ups must be"),
    ("experts", "x", lambda x: x[:, :24].contiguous(), "multiple of 16"),
    ("experts", "x", transposed, "x must be"),
    ("experts", "gate_up", lambda gate_up: gate_up[:, :, 1:], "gate_up must be"),
    ("experts", "down", torch.Tensor.bfloat16, "down must be"),
    ("experts", "offsets", torch.Tensor.int, "offsets must be a int64 tensor"),
    ("experts", "offsets", lambda offsets: offsets + 1, f"offsets must rise from 0 to {ROWS}"),
    ("experts", "offsets", lambda _: torch.tensor([0, 5, 4, ROWS]), "offsets must rise"),
    ("experts", "bias", lambda bias: bias[:, 1:], "bias must be"),
    ("experts", "k", lambda _: -1, "k must be from 1"),
    ("experts", "form", lambda _: 4, "no form of the balance loss number 4"),
    ("experts", "stride", lambda _: 0, "stride must be at least 1"),
    ("experts_backward", "dgate_up", lambda dgate_up: dgate_up[:, :1], "dgate_up must be"),
    ("experts_backward", "ddown", transposed, "ddown must be"),
    ("experts_backward", "gates", torch.Tensor.double, "gates must be"),
    ("experts_backward", "all_gates", lambda gates: gates[1:], "all_gates must be"),
    ("experts_backward", "dsizes", torch.Tensor.double, "dsizes must be"),
    ("experts_backward", "offsets", lambda _: torch.tensor([0, 2, 4, ROWS + 1]), "offsets must rise"),
    ("decode", "x", torch.Tensor.half, "x must be float32 or bfloat16; it is Half"),
    ("decode", "x", torch.Tensor.bfloat16, "gate_up must be a bfloat16 tensor"),
    ("decode", "bias", torch.Tensor.double, "bias must be"),
    ("decode", "tokens", lambda tokens: tokens + 1, f"tokens must add up to {ROWS}"),
    ("decode", "tokens", lambda _: torch.tensor([-1, 3, 4]), "none be negative"),
    ("decode", "probs", lambda probs: probs[:, None], "probs must be"),
    ("attend", "q", lambda q: q[:, :, :3], "3 heads of q must be a multiple of the 2 of k"),
    ("attend", "k", transposed, "k must be"),
    ("attend", "v", lambda v: v[1:], "v must be"),
    ("attend_backward", "dcontext", transposed, "dcontext must be"),
    ("attend_backward", "logsumexp", torch.Tensor.double, "logsumexp must be"),
]  # fmt: skip


def shown(value: Any) -> str:
    """Part of the id of a test, which must be the same in every process."""
    return "" if callable(value) else str(value)[:30]


@pytest.mark.parametrize(("name", "argument", "change", "message"), WRONG, ids=shown)
def test_operators_refuse_wrong_arguments(name: str, argument: str, change: Callable[[Any], Any], message: str) -> None:
    values = arguments()[name]
    values[argument] = change(values[argument])
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.mone, name)(*values.values())


def test_shapes_are_known_without_data() -> None:
    on_meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments()["decode"].values()]
    assert [tuple(output.shape) for output in torch.ops.mone.decode(*on_meta)] == [(ROWS, WIDTH), (ROWS, WORDS)]


def test_experts_and_decode_compile_into_one_graph() -> None:
    values = arguments()["decode"]
    x, gate_up, down, probs, tokens = (values[name] for name in ("x", "gate_up", "down", "probs", "tokens"))

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        decoded = experts.decode(x * 2, gate_up, down, probs, tokens, K, "silu").out_ND
        return decoded, experts.experts(x * 2, gate_up, down, probs, tokens, K, "silu", counting=False).out_ND

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(compiled(x), both(x), strict=True):
        assert torch.equal(ours, theirs)


def test_second_derivatives_and_those_of_decode_are_refused() -> None:
    q, k, v = (value.clone().requires_grad_() for value in arguments()["attend"].values())
    context = attention.attend(q, k, v)
    (gradient,) = torch.autograd.grad(context.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    values = arguments()["experts"]
    leaves = [values[name].requires_grad_() for name in ("x", "gate_up", "down", "probs")]
    out, *_ = torch.ops.mone.experts(*values.values())
    (gradient,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    values = arguments()["decode"]
    values["x"].requires_grad_()
    assert not any(output.requires_grad for output in torch.ops.mone.decode(*values.values()))
