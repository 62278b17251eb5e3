"""Bytes that experts for a few rows read and write, counted from the lists of neurons that the rows keep.

    traffic = count_traffic(kept, experts_N, neurons=1408, width=2048, itemsize=2)
    traffic.once / traffic.dense        # share of the dense experts' weights, if each weight is read from memory once
    bound(0.25, rows=4)                 # what to expect of it for random lists: (1 + 2 (1 - (1 - r)^m)) / 3

The kernel asks for the up and down of a neuron once for each row that keeps it. Rows of one expert share neurons. If the L2
cache holds what they share, memory is read once for each neuron that any row keeps; else up to once for each row.

Shapes: as in `mone_model.kernels.triton.decode`.
"""

from typing import NamedTuple

import torch
import triton

from mone_model.kernels.triton.decode import MOST_COLUMNS, PARTS, TILE, Kept, columns_of


class Traffic(NamedTuple):
    """Bytes. All but `others` are of weights."""

    dense: int
    """Gate, up and down of all neurons of the experts that have rows."""
    gates: int
    """Gates of these experts."""
    requested: int
    """Up and down of the neurons of each row."""
    distinct: int
    """Up and down of the neurons that any row of their expert keeps."""
    others: int
    """All else that `up_down` reads and writes: x, lists, sums and outputs, mostly in caches."""

    @property
    def once(self) -> int:
        """Weights that must come from memory."""
        return self.gates + self.distinct


def count_traffic(kept: Kept, experts_N: torch.Tensor, *, neurons: int, width: int, itemsize: int) -> Traffic:
    """What the kernels move for rows in these experts, each of a token of its own. itemsize: bytes of a weight."""
    counts_N, (rows, slots) = kept.counts_N.long(), kept.ids_NS.shape
    in_list_NS = torch.arange(slots, device=counts_N.device) < counts_N[:, None]
    neuron_NS = experts_N.long()[:, None] * neurons + kept.ids_NS
    used, distinct = len(experts_N[experts_N >= 0].unique()), len(neuron_NS[in_list_NS].unique())
    listed = int(counts_N.sum())
    of_neuron, of_sum = width * itemsize, 4 * width
    blocks = triton.cdiv(width, columns_of(width, MOST_COLUMNS))
    tiles_N = -(-counts_N // TILE.value)
    tiles, parts = int(tiles_N.sum()), int((-(-tiles_N // (-(-tiles_N // PARTS.value)).clamp_min(1))).sum())
    # A program reads x once for each tile. It reads ids and values and writes hidden once, and reads ids and hidden again
    # for each block of columns. The sum of a part is written and read, and the output is written.
    others = tiles * of_neuron + listed * (12 + 8 * blocks) + 2 * parts * of_sum + rows * of_neuron
    of_gates = used * neurons * of_neuron
    return Traffic(3 * of_gates, of_gates, 2 * listed * of_neuron, 2 * distinct * of_neuron, others)


def bound(ratio: float, rows: float) -> float:
    """Share of the dense experts' weights that must be read if each of an expert's rows keeps a random share of neurons."""
    return (1 + 2 * (1 - (1 - ratio) ** rows)) / 3
