"""CPU kernels: experts that compute only the neurons that are kept.

    if library.available():
        kept = experts(x_ND, gate_up_E2HD, down_EHD, probs_N, tokens_E, k, "silu", counting=True)

The sources are csrc/*; their references are `mone_model.neuron_selection` and the backend `loop`.
Shapes: N rows sorted by expert, E experts, D width, H neurons, K kept, W = ceil(H / 16) words of a mask: bit j % 16 of word
j // 16 is neuron j.
"""

from typing import Any, NamedTuple

import torch

from mone_model.activations import ACTIVATIONS
from mone_model.kernels.cpu.library import DTYPES, WORD, call


class Computed(NamedTuple):
    """What the experts computed, and of which neurons."""

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
    """The experts of a layer: up, down and all products of the backward pass only where neurons are kept.

    All inputs fp32, x sorted by expert. The backward pass keeps the k gates and ups of each row and which they are:
    8 k + H/8 bytes. with_gates: for losses that see dropped neurons too.
    """
    offsets = torch.cat([tokens_E.new_zeros(1), tokens_E.cumsum(0)])
    out_ND, masks_NW, _, _, counts_E2H, threshold_N, gate_NH = torch.ops.mone.experts(
        x_ND.contiguous(), gate_up_E2HD, down_EHD, probs_N.contiguous(), offsets,
        k, ACTIVATIONS[activation].kernel_id, counting, with_gates,
    )  # fmt: skip
    return Computed(out_ND, masks_NW, counts_E2H, threshold_N, gate_NH)


@torch.library.custom_op("mone::experts", mutates_args=(), device_types="cpu")
def _experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    probs: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
    activation: int,
    counting: bool,
    with_gates: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = _experts_like(x, gate_up, down, probs, offsets, k, activation, counting, with_gates)
    out, masks, gates, ups, counts, threshold, all_gates = outputs
    sizes = (len(x), len(down), x.size(1), down.size(1), k)
    call(
        "experts_forward", *sizes, offsets, activation, x, gate_up, down, probs,
        out, masks, gates, ups, threshold, counts if counting else None, all_gates if with_gates else None,
    )  # fmt: skip
    return outputs


@_experts.register_fake
def _experts_like(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    probs: torch.Tensor,
    offsets: torch.Tensor,
    k: int,
    activation: int,
    counting: bool,
    with_gates: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, (num_experts, neurons) = len(x), down.shape[:2]
    return (
        torch.empty_like(x),
        x.new_empty(rows, -(-neurons // WORD), dtype=torch.int16),
        x.new_empty(rows, k),
        x.new_empty(rows, k),
        x.new_zeros(num_experts, 2, neurons, dtype=torch.float64),
        x.new_empty(rows),
        x.new_empty(rows if with_gates else 0, neurons),
    )


@torch.library.custom_op("mone::experts_backward", mutates_args=("dgate_up", "ddown"), device_types="cpu")
def _experts_backward(
    dgate_up: torch.Tensor,
    ddown: torch.Tensor,
    add: bool,
    dy: torch.Tensor,
    dgate: torch.Tensor | None,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    probs: torch.Tensor,
    offsets: torch.Tensor,
    masks: torch.Tensor,
    gates: torch.Tensor,
    ups: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dprobs = torch.empty_like(x), torch.empty_like(probs)
    sizes = (len(x), len(down), x.size(1), down.size(1), gates.size(1))
    call(
        "experts_backward", *sizes, offsets, activation, dy, x, gate_up, down, probs, masks, gates, ups,
        dx, dprobs, dgate_up, ddown, add,
    )  # fmt: skip
    if dgate is not None:
        bounds = offsets.tolist()
        for expert, rows in enumerate(map(slice, bounds, bounds[1:])):
            dx[rows] += dgate[rows] @ gate_up[expert, 0]
            dgate_up[expert, 0] += dgate[rows].T @ x[rows]
    return dx, dprobs


@_experts_backward.register_fake
def _(
    dgate_up: Any, ddown: Any, add: Any, dy: Any, dgate: Any, x: Any, gate_up: Any, down: Any, probs: Any, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(probs)


def _save_for_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, gate_up, down, probs, offsets, _, ctx.activation, _, with_gates = inputs
    _, masks, gates, ups, counts, threshold, all_gates = output
    ctx.mark_non_differentiable(masks, gates, ups, counts, threshold, *(() if with_gates else (all_gates,)))
    ctx.save_for_backward(x, gate_up, down, probs, offsets, masks, gates, ups)
    ctx.set_materialize_grads(False)


def _differentiate_experts(ctx: Any, dy: torch.Tensor | None, *others: Any) -> tuple[torch.Tensor | None, ...]:
    dgate, (x, *weights) = others[-1], ctx.saved_tensors[:3]
    if dy is None and dgate is None:
        return (None,) * 9
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dweights = [torch.empty_like(weight) for weight in weights]
    # To Megatron-Core's buffer its hook would add the gradient, but takes an empty one for added if this attribute is true.
    # It is false before the first of a step: then what the buffer holds is of no use, and written over.
    buffered = [weight for weight in weights if hasattr(weight, "grad_added_to_main_grad")]  # not if it is frozen
    sums = [getattr(weight, "main_grad", empty) for weight, empty in zip(weights, dweights, strict=True)]
    add = any(weight.grad_added_to_main_grad for weight in buffered)
    dx, dprobs = torch.ops.mone.experts_backward(*sums, add, dy, dgate, *ctx.saved_tensors, ctx.activation)
    for weight in buffered:
        weight.grad_added_to_main_grad = True
    return dx, *dweights, dprobs, None, None, None, None, None


_experts.register_autograd(_differentiate_experts, setup_context=_save_for_experts)


class Decoded(NamedTuple):
    """What the experts computed for a few rows, and of which neurons."""

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
    """The experts for a few rows, without gradients: up and down of dropped neurons are not even read.

    x and weights in fp32 or bf16, all sums in fp32; D a multiple of 16. threshold: keep the neurons whose |act(gate)|
    reaches it, as NaN does, in place of the k best.
    """
    (rows, width), (num_experts, neurons) = x_ND.shape, down_EHD.shape[:2]
    out_ND, masks_NW = x_ND.new_empty(rows, width), x_ND.new_empty(rows, -(-neurons // WORD), dtype=torch.int16)
    by_count, by_size = (k, 0.0) if threshold is None else (0, float(threshold))
    call(
        f"decode_{DTYPES[x_ND.dtype]}", rows, num_experts, width, neurons, by_count, by_size, tokens_E.contiguous(),
        ACTIVATIONS[activation].kernel_id, x_ND.contiguous(), gate_up_E2HD, down_EHD, probs_N.float().contiguous(),
        out_ND, masks_NW,
    )  # fmt: skip
    return Decoded(out_ND, masks_NW)
