"""Calibration of thresholds on a trained model, on one process.

    with counting_magnitudes(model) as counts_LM:
        model(tokens_BS, position_ids_BS, None)
    thresholds_L = find_thresholds(counts_LM, ratio=0.25)     # mone_model.thresholds
    select_by_threshold(model, thresholds_L)                  # to evaluate the model with them

Shapes: L layers, M magnitudes, N rows (a token in one of its experts), D width, B sequences of s tokens.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch

from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import expert_gemm_loop, rows_of_experts
from mone_model.megatron.experts import NeuronExperts
from mone_model.megatron.gpt import moe_layers
from mone_model.neuron_selection import scores_of
from mone_model.thresholds import AtLeast, count_magnitudes


def select_by_threshold(model: torch.nn.Module, thresholds_L: Sequence[float]) -> None:
    """Evaluation mode, and selection by these thresholds in place of the K best."""
    model.eval()
    for layer, experts, _ in moe_layers(model):
        experts.rule = AtLeast(thresholds_L[layer])


@contextlib.contextmanager
def counting_magnitudes(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """[L, 2^16] sums of `count_magnitudes` over all rows that pass through the model inside the block."""
    layers = {layer: experts for layer, experts, _ in moe_layers(model)}
    counts_LM = torch.zeros(len(layers), 2**16, dtype=torch.int64)

    @torch.no_grad()
    def count(layer: int, experts: NeuronExperts, inputs: tuple[torch.Tensor, ...]) -> None:
        x_ND, tokens_E = inputs[:2]
        gate_NH = expert_gemm_loop(x_ND, experts.gate_up_weight[:, 0].transpose(1, 2), tokens_E)
        active_NH = ACTIVATIONS[experts.activation].function(gate_NH)
        bias_NH = rows_of_experts(experts.neuron_bias, tokens_E, len(x_ND))
        counts_LM[layer] += count_magnitudes(scores_of(active_NH, bias_NH)).cpu()

    with contextlib.ExitStack() as hooks:
        for layer, experts in layers.items():
            hooks.callback(experts.register_forward_pre_hook(functools.partial(count, layer)).remove)
        yield counts_LM
