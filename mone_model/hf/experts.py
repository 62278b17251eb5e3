"""The experts implementation `mone` of transformers: this project's backends compute the experts of `MoneExperts`.

    model.set_experts_implementation("mone")         # after `import mone_model.hf`, which registers it

On CPUs a few rows are computed by the backend `decode`, which reads the up and down weights of kept neurons only, and many
rows by `sparse` or a dense backend, whichever is faster here.

Shapes: N tokens, R = N * top-k rows (a token in one of its experts), D width, H neurons of an expert, E experts.
"""

import functools

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mone_model.expert_backends import BACKENDS, Request, Rule, measure, measure_max_decode_rows
from mone_model.hf.families import ACTIVATIONS
from mone_model.hf.modeling_mone import MoneExperts
from mone_model.kernels.cpu import library
from mone_model.neuron_selection import TopK
from mone_model.thresholds import AtLeast


def compute_experts(
    self: MoneExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[N, D], experts [N, k] and their weights [N, k] -> [N, D]; a registered function of transformers' ExpertsInterface."""
    experts, chosen = self.num_experts, top_k_index.size(1)
    index_R = top_k_index.flatten()
    order_R = index_R.argsort(stable=True)
    tokens_E = torch.bincount(index_R, minlength=experts + 1)
    # Under expert parallelism, experts of other ranks have the number E and come last.
    order_R, tokens_E = order_R[: len(order_R) - int(tokens_E[experts])], tokens_E[:experts]
    rows_R = order_R // chosen
    gate_up_E2HD = self.gate_up_proj.unflatten(1, (2, self.intermediate_dim))
    down_EHD = _neuron_major(self.down_proj).transpose(1, 2)
    rule: Rule = TopK(self.k) if self.threshold is None else AtLeast(self.threshold)
    request = Request(rule, ACTIVATIONS[self.activation])
    backend = BACKENDS[_choose(self, len(order_R))]
    weights = backend.prepare(gate_up_E2HD, down_EHD)
    probs_R = top_k_weights.flatten()[order_R].float()
    out_RD = backend.compute(weights, hidden_states[rows_R], tokens_E, probs_R, request).out_ND
    return torch.zeros_like(hidden_states).index_add_(0, rows_R, out_RD.to(hidden_states.dtype))


def _neuron_major(down: torch.nn.Parameter) -> torch.nn.Parameter:
    """The same weights [E, D, H], once moved so that those of a neuron lie together in memory."""
    if not down.transpose(1, 2).is_contiguous():
        down.data = down.data.transpose(1, 2).contiguous().transpose(1, 2)
    return down


def _choose(experts: MoneExperts, rows: int) -> str:
    """The name of the backend for so many rows."""
    weight = experts.gate_up_proj
    activation = ACTIVATIONS[experts.activation]
    usable = experts.hidden_dim % library.WORD == 0 and library.usable(weight, dtypes=library.DTYPES)
    shape = (experts.hidden_dim, experts.intermediate_dim, experts.k, activation, weight.dtype)
    if weight.device.type != "cpu":
        return "grouped"
    sparse = usable and weight.dtype == torch.float32 and experts.threshold is None
    many = measure(*shape, sparse=sparse).fastest
    if usable and not torch.is_grad_enabled() and 0 < rows <= _max_decode_rows(*shape, many):
        return "decode"
    return many


_max_decode_rows = functools.cache(measure_max_decode_rows)

ALL_EXPERTS_FUNCTIONS.register("mone", compute_experts)
