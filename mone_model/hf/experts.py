"""The experts implementation `mone` of transformers: this project's backends compute the experts of `MoneExperts`.

    model.set_experts_implementation("mone")         # after `import mone_model.hf`, which registers it

On CPUs a few rows are computed by the backend `decode`, which reads the up and down weights of kept neurons only, and many
rows by `sparse` or a dense backend, whichever is faster here.

Shapes: N tokens, D width, H neurons of an expert, E experts.
"""

import functools

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mone_model.expert_backends import BACKENDS, Request, Rule, measure, measure_max_decode_rows, route
from mone_model.hf.families import ACTIVATIONS
from mone_model.hf.modeling_mone import MoneExperts
from mone_model.kernels.cpu import library
from mone_model.neuron_selection import TopK
from mone_model.thresholds import AtLeast


def compute_experts(
    self: MoneExperts, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """[N, D], experts [N, k] and their weights [N, k] -> [N, D]; a registered function of transformers' ExpertsInterface."""
    gate_up_E2HD = self.gate_up_proj.unflatten(1, (2, self.intermediate_dim))
    down_EHD = _neuron_major(self.down_proj).transpose(1, 2)
    rule: Rule = TopK(self.k) if self.threshold is None else AtLeast(self.threshold)
    request = Request(rule, ACTIVATIONS[self.activation], bias_EH=self.neuron_bias)
    backend = BACKENDS[_choose(self, top_k_index.numel())]
    weights = backend.prepare(gate_up_E2HD, down_EHD)
    return route(backend, weights, hidden_states, top_k_index, top_k_weights, request)


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
