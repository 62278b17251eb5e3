"""Selection by a threshold in place of the K best: a row keeps the neurons whose |act(gate)| reaches it.

    counts_M = count_magnitudes(active_NH)                  # for each layer, summed over calibration data
    thresholds_L = find_thresholds(counts_LM, ratio=0.25)    # each keeps a quarter of the neurons on average
    rule = AtLeast(thresholds_L[0])

No neuron waits for the gates of the others. Shapes: L layers, M magnitudes, N rows, H neurons.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mone_model.neuron_selection import scores_of


class AtLeast(NamedTuple):
    """Keep the neurons whose |act(gate)| is at least `threshold`; NaN counts as infinity."""

    threshold: float


def count_magnitudes(active_NH: torch.Tensor) -> torch.Tensor:
    """[2^16] int64: how often |act(gate)|, or another score, has each magnitude, rounded down to 9 significant bits."""
    bits = scores_of(active_NH.float()).view(torch.int32) >> _DROPPED_BITS
    return torch.bincount(bits.flatten(), minlength=2**16)


def find_thresholds(counts_LM: torch.Tensor, *, ratio: float | Sequence[float], per: str = "layer") -> list[float]:
    """For each layer the largest threshold that at least this share of its neurons reaches on average.

    counts_LM: [L, 2^16] sums of `count_magnitudes`. ratio: the share, or one for each layer. per: `layer`, or `model` for
    one threshold in all layers.
    """
    if per == "model":
        counts_LM = counts_LM.sum(0, keepdim=True).expand_as(counts_LM)
    ratio_L1 = torch.tensor(ratio, dtype=torch.float64).reshape(-1, 1)
    last_L = (_shares_from(counts_LM) >= ratio_L1).sum(-1) - 1
    return (last_L.int() << _DROPPED_BITS).view(torch.float32).tolist()


def shares_reaching(counts_LM: torch.Tensor, thresholds_L: Sequence[float]) -> list[float]:
    """For each layer the share of neurons that its threshold, one of `find_thresholds`, keeps on average."""
    index_L1 = torch.tensor(thresholds_L).view(torch.int32)[:, None] >> _DROPPED_BITS
    return _shares_from(counts_LM).gather(-1, index_L1.long())[:, 0].tolist()


def _shares_from(counts_LM: torch.Tensor) -> torch.Tensor:
    """[L, 2^16] share of each magnitude and all larger ones."""
    return counts_LM.flip(-1).cumsum(-1).flip(-1).double() / counts_LM.sum(-1, keepdim=True)


_DROPPED_BITS = 15  # of the 23 that fp32 has behind the first
