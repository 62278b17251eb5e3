"""CPU kernels: activation, selection and product with up in one pass over each row, and the gradients.

    if selection.selects(gate_NH):
        hidden, masks, gates, ups, threshold = selection.select_and_gate(gate_NH, up_NH, probs_N, k, "silu")
        dgate, dup, dprobs = selection.select_and_gate_backward(dhidden, masks, gates, ups, probs_N, "silu")

The source is csrc/selection.cpp; the reference is `mone_model.neuron_selection.select_and_gate_reference`.
"""

from typing import Any

import torch

from mone_model.activations import ACTIVATIONS
from mone_model.kernels.cpu.library import DTYPES, WORD, define, usable

_select_and_gate = define(
    "select_and_gate_cpu",
    "(Tensor gate, Tensor up, Tensor probs, int k, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_select_and_gate_backward = define(
    "select_and_gate_backward_cpu",
    "(Tensor dhidden, Tensor masks, Tensor gates, Tensor ups, Tensor probs, int activation) -> (Tensor, Tensor, Tensor)",
)


def select_and_gate(
    gate: torch.Tensor, up: torch.Tensor, probs: torch.Tensor, k: int, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mone::select_and_gate` (mone_model.neuron_selection) for fp32 and bf16."""
    kernel_id = ACTIVATIONS[activation].kernel_id
    return _select_and_gate(_rows_of(gate), _rows_of(up), probs.float().contiguous(), k, kernel_id)


@torch.library.register_fake("mone::select_and_gate_cpu")
def _(gate: torch.Tensor, up: Any, probs: torch.Tensor, k: int, activation: Any) -> tuple[torch.Tensor, ...]:
    rows, neurons = gate.shape
    hidden, masks = gate.new_empty(rows, neurons), gate.new_empty(rows, -(-neurons // WORD), dtype=torch.int16)
    return hidden, masks, gate.new_empty(rows, k), gate.new_empty(rows, k), probs.new_empty(rows)


def select_and_gate_backward(
    dhidden: torch.Tensor, masks: torch.Tensor, gates: torch.Tensor, ups: torch.Tensor, probs: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its gradients: of gate, up and probs."""
    weight, kernel_id = probs.float().contiguous(), ACTIVATIONS[activation].kernel_id
    dgate, dup, dprobs = _select_and_gate_backward(dhidden.contiguous(), masks, gates, ups, weight, kernel_id)
    return dgate, dup, dprobs.to(probs.dtype)


@torch.library.register_fake("mone::select_and_gate_backward_cpu")
def _(dhidden: torch.Tensor, masks: Any, gates: Any, ups: Any, probs: torch.Tensor, _: Any) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(dhidden), torch.empty_like(dhidden), torch.empty_like(probs)


def selects(gate: torch.Tensor) -> bool:
    """Whether `select_and_gate` can be used for this tensor here."""
    return gate.size(1) <= 65536 and usable(gate, dtypes=DTYPES)


def _rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[..., H] -> [N, H] with contiguous rows; copied only if necessary."""
    rows = tensor.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()
