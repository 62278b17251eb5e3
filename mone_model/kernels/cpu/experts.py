"""CPU kernels: experts that compute only the neurons that are kept.

    if library.available():
        kept = experts(x_ND, gate_up_E2HD, down_EHD, probs_N, tokens_E, k, "silu", counting=True)

The sources are csrc/*; their references are `mone_model.neuron_selection` and the backend `loop`.
Shapes: N rows sorted by expert, E experts, D width, H neurons, K kept, W = ceil(H / 16) words of a mask: bit j % 16 of word
j // 16 is neuron j.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from mone_model.activations import ACTIVATIONS
from mone_model.kernels.cpu.library import WORD, define

_experts = define(
    "experts",
    "(Tensor x, Tensor gate_up, Tensor down, Tensor probs, Tensor offsets, int k, int activation, bool counting, "
    "bool with_gates) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    differentiable=True,
)
_experts_backward = define(
    "experts_backward",
    "(Tensor(a!) dgate_up, Tensor(b!) ddown, bool add, Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor probs, "
    "Tensor offsets, Tensor masks, Tensor gates, Tensor ups, int activation) -> (Tensor, Tensor)",
)
_decode = define(
    "decode",
    "(Tensor x, Tensor gate_up, Tensor down, Tensor probs, Tensor tokens, int k, float? threshold, int activation) "
    "-> (Tensor, Tensor)",
)


class Computed(NamedTuple):
    """Outputs of the experts and which neurons were kept."""

    out_ND: torch.Tensor
    """[N, D] weighted outputs."""
    masks_NW: torch.Tensor
    """[N, W] int16, as of `mone_model.neuron_selection.select_and_gate`."""
    counts_E2H: torch.Tensor
    """[E, 2, H] float64: in how many rows each neuron was kept, and the sum of its |gate|; zeros unless counting."""
    threshold_N: torch.Tensor
    """[N] the smallest |gate| kept."""
    gate_NH: torch.Tensor
    """[N, H] the gates before their activation, of dropped neurons too, differentiable; [0, H] unless with_gates."""


def experts(
    x_ND: torch.Tensor,
    gate_up_E2HD: torch.Tensor,
    down_EHD: torch.Tensor,
    probs_N: torch.Tensor,
    tokens_E: torch.Tensor,
    k: int,
    activation: str,
    *,
    counting: bool,
    with_gates: bool = False,
) -> Computed:
    """The experts of a layer. Up, down and all products of the backward pass are computed for kept neurons only.

    All inputs are fp32, x is sorted by expert. For the backward pass it saves the k gates and ups of each row and a mask:
    8 k + H/8 bytes. with_gates: also return the gates of all neurons, for losses that need them.
    """
    offsets = torch.cat([tokens_E.new_zeros(1), tokens_E.cumsum(0)])
    out_ND, masks_NW, _, _, counts_E2H, threshold_N, gate_NH = _experts(
        x_ND.contiguous(), gate_up_E2HD, down_EHD, probs_N.contiguous(), offsets,
        k, ACTIVATIONS[activation].kernel_id, counting, with_gates,
    )  # fmt: skip
    return Computed(out_ND, masks_NW, counts_E2H, threshold_N, gate_NH)


@torch.library.register_fake("mone::experts")
def _(
    x: torch.Tensor, gate_up: Any, down: torch.Tensor, probs: Any, offsets: Any, k: int, activation: Any, counting: Any,
    with_gates: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    rows, (num_experts, neurons) = len(x), down.shape[:2]
    return (
        torch.empty_like(x),
        x.new_empty(rows, -(-neurons // WORD), dtype=torch.int16),
        x.new_empty(rows, k),
        x.new_empty(rows, k),
        x.new_empty(num_experts, 2, neurons, dtype=torch.float64),
        x.new_empty(rows),
        x.new_empty(rows if with_gates else 0, neurons),
    )


@torch.library.register_fake("mone::experts_backward")
def _(
    dgate_up: Any, ddown: Any, add: Any, dy: Any, x: torch.Tensor, gate_up: Any, down: Any, probs: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(probs)


@torch.library.custom_op("mone::add_gate_gradients", mutates_args=("dx", "dgate_up"))
def _add_gate_gradients(
    dx: torch.Tensor,
    dgate_up: torch.Tensor,
    dgate: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    bounds = offsets.tolist()
    for expert, rows in enumerate(map(slice, bounds, bounds[1:])):
        dx[rows] += dgate[rows] @ gate_up[expert, 0]
        dgate_up[expert, 0] += dgate[rows].T @ x[rows]


@torch.library.register_fake("mone::add_gate_gradients")
def _(*_: Any) -> None:
    return None


def _save_for_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, gate_up, down, probs, offsets, _, ctx.activation, _, with_gates = inputs
    _, masks, gates, ups, counts, threshold, all_gates = output
    ctx.mark_non_differentiable(masks, gates, ups, counts, threshold, *(() if with_gates else (all_gates,)))
    ctx.save_for_backward(x, gate_up, down, probs, offsets, masks, gates, ups)
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate_experts(ctx: Any, dy: torch.Tensor | None, *others: Any) -> tuple[torch.Tensor | None, ...]:
    dgate, (x, *weights) = others[-1], ctx.saved_tensors[:3]
    if dy is None and dgate is None:
        return (None,) * 9
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dweights = [torch.empty_like(weight) for weight in weights]
    # Megatron-Core's hook adds a gradient to its buffer unless this attribute says that this has been done. The attribute is
    # false before the first gradient of a step, which overwrites the buffer.
    buffered = [weight for weight in weights if hasattr(weight, "grad_added_to_main_grad")]  # a frozen weight has none
    sums = [getattr(weight, "main_grad", empty) for weight, empty in zip(weights, dweights, strict=True)]
    add = any(weight.grad_added_to_main_grad for weight in buffered)
    dx, dprobs = _experts_backward(*sums, add, dy, *ctx.saved_tensors, ctx.activation)
    if dgate is not None:
        offsets = ctx.saved_tensors[4]
        _add_gate_gradients(dx, sums[0], dgate, x, weights[0], offsets)
    for weight in buffered:
        weight.grad_added_to_main_grad = True
    return dx, *dweights, dprobs, None, None, None, None, None


torch.library.register_autograd("mone::experts", _differentiate_experts, setup_context=_save_for_experts)


class Decoded(NamedTuple):
    """Outputs of the experts for a few rows and which neurons were kept."""

    out_ND: torch.Tensor
    """[N, D] weighted outputs."""
    masks_NW: torch.Tensor
    """[N, W] int16, as of `mone_model.neuron_selection.select_and_gate`."""


def decode(
    x_ND: torch.Tensor,
    gate_up_E2HD: torch.Tensor,
    down_EHD: torch.Tensor,
    probs_N: torch.Tensor,
    tokens_E: torch.Tensor,
    k: int,
    activation: str,
    *,
    threshold: float | None = None,
) -> Decoded:
    """The experts for a few rows, without gradients. Weights up and down of dropped neurons are not read.

    x and weights are fp32 or bf16, sums are fp32, D is a multiple of 16. threshold: keep the neurons whose |act(gate)| is at
    least this, instead of the k best. NaN counts as infinity.
    """
    return Decoded(
        *_decode(
            x_ND.contiguous(), gate_up_E2HD, down_EHD, probs_N.float().contiguous(), tokens_E.contiguous(), k, threshold,
            ACTIVATIONS[activation].kernel_id,
        )
    )  # fmt: skip


@torch.library.register_fake("mone::decode")
def _(x: torch.Tensor, gate_up: Any, down: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(len(x), -(-down.size(1) // WORD), dtype=torch.int16)
