"""A trained model on one process for inference: for a few tokens its experts read only the neurons that they keep.

    prepare_inference(model)                                # exact: the K best of each token in each expert
    with counting_magnitudes(model) as counts_LM:
        model(tokens_BS, position_ids_BS, None)
    thresholds_L = find_thresholds(counts_LM, ratio=0.25)   # or by thresholds (mone_model.thresholds)
    prepare_inference(model, thresholds_L)

Shapes: L layers, M magnitudes, N rows (a token in one of its experts), D width, B sequences of s tokens.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch

from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import expert_gemm_loop, measure_max_decode_rows
from mone_model.kernels.cpu import library
from mone_model.megatron.experts import NeuronExperts
from mone_model.megatron.gpt import moe_layers
from mone_model.thresholds import AtLeast, count_magnitudes


def prepare_inference(model: torch.nn.Module, thresholds_L: Sequence[float] | None = None) -> int:
    """Evaluation mode, selection by these thresholds (None: by the K best), and the `decode` backend for few rows.

    Returns up to how many rows `decode` serves, as measured on this machine; 0 where it cannot (GPUs, no compiler).
    """
    model.eval()
    max_decode_rows = 0
    for layer, experts, _ in moe_layers(model):
        weight, neurons = experts.gate_up_weight, experts.num_neurons
        width = weight.size(-1)
        whole = weight.size(2) == neurons and width % library.WORD == 0
        if layer == 0 and whole and library.usable(weight, dtypes=library.DTYPES):
            max_decode_rows = measure_max_decode_rows(
                width, neurons, experts.top_k.k, experts.activation, weight.dtype, experts.backend
            )
        experts.rule = experts.top_k if thresholds_L is None else AtLeast(thresholds_L[layer])
        experts.max_decode_rows = max_decode_rows
    return max_decode_rows


@contextlib.contextmanager
def counting_magnitudes(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """[L, 2^16] sums of `count_magnitudes` over all rows that pass through the model inside the block."""
    layers = {layer: experts for layer, experts, _ in moe_layers(model)}
    counts_LM = torch.zeros(len(layers), 2**16, dtype=torch.int64)

    @torch.no_grad()
    def count(layer: int, experts: NeuronExperts, inputs: tuple[torch.Tensor, ...]) -> None:
        x_ND, tokens_E = inputs[:2]
        gate_NH = expert_gemm_loop(x_ND, experts.gate_up_weight[:, 0].transpose(1, 2), tokens_E)
        counts_LM[layer] += count_magnitudes(ACTIVATIONS[experts.activation].function(gate_NH)).cpu()

    with contextlib.ExitStack() as hooks:
        for layer, experts in layers.items():
            hooks.callback(experts.register_forward_pre_hook(functools.partial(count, layer)).remove)
        yield counts_LM
