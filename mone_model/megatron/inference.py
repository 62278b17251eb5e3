"""A trained model on one process for inference: for a few tokens its experts read only the neurons that they keep.

    prepare_inference(model)                                # exact: the K best of each token in each expert
    with counting_magnitudes(model) as counts_LM:
        model(tokens_BS, position_ids_BS, None)
    thresholds_L = find_thresholds(counts_LM, ratio=0.25)   # or all neurons that reach a threshold,
    prepare_inference(model, thresholds_L)                  # so many of them on average

Shapes: L layers, M magnitudes, N rows (a token in one of its experts), D width, H neurons, B sequences of s tokens.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch

from mone_model.activations import ACTIVATIONS
from mone_model.expert_backends import expert_gemm_loop, measure_max_decode_rows
from mone_model.kernels.cpu import experts as cpu
from mone_model.megatron.experts import NeuronExperts
from mone_model.megatron.gpt import moe_layers
from mone_model.neuron_selection import scores_of


def prepare_inference(model: torch.nn.Module, thresholds_L: Sequence[float] | None = None) -> int:
    """Evaluation mode, selection by these thresholds (None: by the K best), and the faster experts for few rows.

    Returns up to how many rows they serve, as measured on this machine; 0 where they cannot (GPUs, no compiler).
    """
    model.eval()
    max_decode_rows = 0
    for layer, experts, _ in moe_layers(model):
        weight, neurons = experts.gate_up_weight, experts.num_neurons
        width = weight.size(-1)
        here = weight.device.type == "cpu" and weight.size(2) == neurons and width % cpu.WORD == 0 and cpu.available()
        if layer == 0 and here and weight.dtype in (torch.float32, torch.bfloat16):
            max_decode_rows = measure_max_decode_rows(
                width, neurons, experts.active_neurons, experts.activation, weight.dtype, experts.method
            )
        experts.threshold = None if thresholds_L is None else thresholds_L[layer]
        experts.max_decode_rows = max_decode_rows
    return max_decode_rows


@contextlib.contextmanager
def counting_magnitudes(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """[L, 2^16] how often |act(gate)| of a neuron had each magnitude, rounded down to 9 significant bits, dropped or not.

    Filled by whatever passes through the model inside the block.
    """
    layers = {layer: experts for layer, experts, _ in moe_layers(model)}
    counts_LM = torch.zeros(len(layers), 2**16, dtype=torch.int64)

    @torch.no_grad()
    def count(layer: int, experts: NeuronExperts, inputs: tuple[torch.Tensor, ...]) -> None:
        x_ND, tokens_E = inputs[:2]
        gate_NH = expert_gemm_loop(x_ND, experts.gate_up_weight[:, 0].transpose(1, 2), tokens_E)
        bits = scores_of(ACTIVATIONS[experts.activation].function(gate_NH).float()).view(torch.int32) >> _DROPPED_BITS
        counts_LM[layer] += torch.bincount(bits.flatten(), minlength=2**16).cpu()

    with contextlib.ExitStack() as hooks:
        for layer, experts in layers.items():
            hooks.callback(experts.register_forward_pre_hook(functools.partial(count, layer)).remove)
        yield counts_LM


def find_thresholds(counts_LM: torch.Tensor, *, ratio: float, per: str = "layer") -> list[float]:
    """For each layer the largest threshold that at least this share of its neurons reaches on average.

    counts_LM: from `counting_magnitudes`. per: `layer`, or `model` for one threshold in all layers.
    """
    if per == "model":
        counts_LM = counts_LM.sum(0, keepdim=True).expand_as(counts_LM)
    last_L = (_shares_from(counts_LM) >= ratio).sum(-1) - 1
    return (last_L.int() << _DROPPED_BITS).view(torch.float32).tolist()


def shares_reaching(counts_LM: torch.Tensor, thresholds_L: Sequence[float]) -> list[float]:
    """For each layer the share of neurons that its threshold, one of `find_thresholds`, keeps on average."""
    places_L1 = torch.tensor(thresholds_L).view(torch.int32)[:, None] >> _DROPPED_BITS
    return _shares_from(counts_LM).gather(-1, places_L1.long())[:, 0].tolist()


def _shares_from(counts_LM: torch.Tensor) -> torch.Tensor:
    """[L, 2^16] share of each magnitude and all larger ones."""
    return counts_LM.flip(-1).cumsum(-1).flip(-1).double() / counts_LM.sum(-1, keepdim=True)


_DROPPED_BITS = 15  # of the 23 that fp32 has behind the first
