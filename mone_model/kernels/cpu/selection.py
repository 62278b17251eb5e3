"""CPU kernels: activation, selection and product with up in one pass over each row, and the gradients.

    if selection.selects(gate_NH):
        hidden, masks, gates, ups, threshold = selection.select_and_gate(gate_NH, up_NH, probs_N, k, "silu")
        dgate, dup, dprobs = selection.select_and_gate_backward(dhidden, masks, gates, ups, probs_N, "silu")

The source is csrc/selection.cpp; the reference is `mone_model.neuron_selection.select_and_gate_reference`.
"""

import torch

from mone_model.activations import ACTIVATIONS
from mone_model.kernels.cpu.library import DTYPES, WORD, call, rows_of, usable


def select_and_gate(
    gate: torch.Tensor, up: torch.Tensor, probs: torch.Tensor, k: int, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mone::select_and_gate` (mone_model.neuron_selection) for fp32 and bf16."""
    gate, up = rows_of(gate), rows_of(up)
    rows, neurons = gate.shape
    hidden = gate.new_empty(rows, neurons)
    masks = gate.new_empty(rows, -(-neurons // WORD), dtype=torch.int16)
    gates, ups, threshold = gate.new_empty(rows, k), gate.new_empty(rows, k), gate.new_empty(rows, dtype=torch.float32)
    call(
        f"select_and_gate_{DTYPES[gate.dtype]}", rows, neurons, k, ACTIVATIONS[activation].kernel_id, gate, gate.stride(0),
        up, up.stride(0), probs.float().contiguous(), hidden, masks, gates, ups, threshold,
    )  # fmt: skip
    return hidden, masks, gates, ups, threshold


def select_and_gate_backward(
    dhidden: torch.Tensor, masks: torch.Tensor, gates: torch.Tensor, ups: torch.Tensor, probs: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its gradients: of gate, up and probs."""
    dhidden = dhidden.contiguous()
    dgate, dup, dprobs = torch.empty_like(dhidden), torch.empty_like(dhidden), torch.empty_like(probs, dtype=torch.float32)
    call(
        f"select_and_gate_backward_{DTYPES[dhidden.dtype]}", *dhidden.shape, gates.size(1),
        ACTIVATIONS[activation].kernel_id, dhidden, masks, gates, ups, probs.float().contiguous(), dgate, dup, dprobs,
    )  # fmt: skip
    return dgate, dup, dprobs.to(probs.dtype)


def selects(gate: torch.Tensor) -> bool:
    """Whether `select_and_gate` can be used for this tensor here."""
    return gate.size(1) <= 65536 and usable(gate, dtypes=DTYPES)
