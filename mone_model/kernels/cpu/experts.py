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
from mone_model.config import NEURON_BALANCE_FORMS
from mone_model.kernels.cpu.library import WORD, define
from mone_model.neuron_balance import Balance

_experts = define(
    "experts",
    "(Tensor x, Tensor gate_up, Tensor down, Tensor probs, Tensor offsets, Tensor? bias, int k, int activation, "
    "bool counting, int form, int stride) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    differentiable=True,
)
_experts_backward = define(
    "experts_backward",
    "(Tensor(a!) dgate_up, Tensor(b!) ddown, bool add, Tensor dy, Tensor x, Tensor gate_up, Tensor down, Tensor probs, "
    "Tensor offsets, Tensor masks, Tensor gates, Tensor ups, Tensor all_gates, Tensor? dsizes, int activation, int form, "
    "int stride) -> (Tensor, Tensor)",
)
_decode = define(
    "decode",
    "(Tensor x, Tensor gate_up, Tensor down, Tensor probs, Tensor tokens, Tensor? bias, int k, float? threshold, "
    "int activation) "
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
    """[N] the smallest score kept: |gate|, plus the bias if there is one."""
    sizes_EH: torch.Tensor
    """[E, H] `mone_model.neuron_balance.neuron_sizes`, differentiable; zeros without `balance`."""


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
    balance: Balance | None = None,
    bias_EH: torch.Tensor | None = None,
) -> Computed:
    """The experts of a layer. Up, down and all products of the backward pass are computed for kept neurons only.

    All inputs are fp32, x is sorted by expert. For the backward pass it saves the k gates and ups of each row and a mask:
    8 k + H/8 bytes. balance: also compute the sizes of neurons for the balance loss. In the forms normalised and unmasked,
    dropped neurons have a gradient too: it saves all H gates of the sampled rows, and two products with their gradient
    are dense. bias_EH: [E, H], not negative, added to |gate| for the selection only.
    """
    offsets = torch.cat([tokens_E.new_zeros(1), tokens_E.cumsum(0)])
    form, stride = (0, 1) if balance is None else (1 + NEURON_BALANCE_FORMS.index(balance.form), balance.stride)
    out_ND, masks_NW, _, _, counts_E2H, threshold_N, _, sizes_EH = _experts(
        x_ND.contiguous(), gate_up_E2HD, down_EHD, probs_N.contiguous(), offsets, bias_EH,
        k, ACTIVATIONS[activation].kernel_id, counting, form, stride,
    )  # fmt: skip
    return Computed(out_ND, masks_NW, counts_E2H, threshold_N, sizes_EH)


@torch.library.register_fake("mone::experts")
def _(
    x: torch.Tensor, gate_up: Any, down: torch.Tensor, probs: Any, offsets: torch.Tensor, bias: Any, k: int,
    activation: Any, counting: Any, form: int, stride: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    rows, (num_experts, neurons) = len(x), down.shape[:2]
    is_dense = form > 0 and NEURON_BALANCE_FORMS[form - 1] != "masked"
    if is_dense and stride > 1:  # depends on the data
        sampled: Any = torch.library.get_ctx().new_dynamic_size()
    else:
        sampled = rows if is_dense else 0
    return (
        torch.empty_like(x),
        x.new_empty(rows, -(-neurons // WORD), dtype=torch.int16),
        x.new_empty(rows, k),
        x.new_empty(rows, k),
        x.new_empty(num_experts, 2, neurons, dtype=torch.float64),
        x.new_empty(rows),
        x.new_empty(sampled, neurons),
        x.new_empty(num_experts, neurons),
    )


@torch.library.register_fake("mone::experts_backward")
def _(
    dgate_up: Any, ddown: Any, add: Any, dy: Any, x: torch.Tensor, gate_up: Any, down: Any, probs: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(probs)


def _save_for_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, gate_up, down, probs, offsets, _, _, activation, _, form, stride = inputs
    _, masks, gates, ups, counts, threshold, all_gates, sizes = output
    ctx.mark_non_differentiable(masks, gates, ups, counts, threshold, all_gates, *(() if form else (sizes,)))
    ctx.save_for_backward(x, gate_up, down, probs, offsets, masks, gates, ups, all_gates)
    ctx.options = activation, form, stride
    ctx.set_materialize_grads(False)


@once_differentiable
def _differentiate_experts(ctx: Any, dy: torch.Tensor | None, *others: Any) -> tuple[torch.Tensor | None, ...]:
    dsizes, (x, *weights) = others[-1], ctx.saved_tensors[:3]
    if dy is None and dsizes is None:
        return (None,) * 11
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dweights = [torch.empty_like(weight) for weight in weights]
    # Megatron-Core's hook adds a gradient to its buffer unless this attribute says that this has been done. The attribute is
    # false before the first gradient of a step, which overwrites the buffer.
    buffered = [weight for weight in weights if hasattr(weight, "grad_added_to_main_grad")]  # a frozen weight has none
    sums = [getattr(weight, "main_grad", empty) for weight, empty in zip(weights, dweights, strict=True)]
    add = any(weight.grad_added_to_main_grad for weight in buffered)
    dsizes = None if dsizes is None else dsizes.contiguous()
    dx, dprobs = _experts_backward(*sums, add, dy, *ctx.saved_tensors, dsizes, *ctx.options)
    for weight in buffered:
        weight.grad_added_to_main_grad = True
    return dx, *dweights, dprobs, None, None, None, None, None, None, None


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
    bias_EH: torch.Tensor | None = None,
) -> Decoded:
    """The experts for a few rows, without gradients. Weights up and down of dropped neurons are not read.

    x and weights are fp32 or bf16, sums are fp32, D is a multiple of 16. threshold: keep the neurons whose |act(gate)| is at
    least this, instead of the k best. NaN counts as infinity. bias_EH: as of `experts`, also with a threshold.
    """
    return Decoded(
        *_decode(
            x_ND.contiguous(), gate_up_E2HD, down_EHD, probs_N.float().contiguous(), tokens_E.contiguous(), bias_EH, k,
            threshold, ACTIVATIONS[activation].kernel_id,
        )
    )  # fmt: skip


@torch.library.register_fake("mone::decode")
def _(x: torch.Tensor, gate_up: Any, down: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(len(x), -(-down.size(1) // WORD), dtype=torch.int16)
