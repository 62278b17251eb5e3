"""The top-K neurons of each token in each expert: the one idea of Mixture of Neuron Experts.

    gate_NH = act(x_ND @ w_gate)                     # every neuron of the expert, dense
    kept = select_neurons(gate_NH, k)                # S(x) = argtop-K_j |gate_j|
    hidden_NH = gate_NH * up_NH * kept.mask_NH       # dropped neurons are silent, forward and backward

Shapes: N rows (a token in one of its experts), H neurons of the whole expert, h neurons on this rank (h = H without
expert-tensor parallelism). Source: arXiv 2510.05781.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist


class Selection(NamedTuple):
    """Which neurons were kept."""

    mask_NH: torch.Tensor
    """[N, h] bool, exactly K true per row over all ranks of the expert."""
    threshold_N: torch.Tensor
    """[N] the K-th largest |gate| of the row: the smallest that was kept."""


def select_neurons_reference(gate_NH: torch.Tensor, k: int) -> Selection:
    """What `select_neurons` means, by a stable sort; every faster form must give the same mask, ties included."""
    score_NH = gate_NH.detach().abs()
    order_NH = score_NH.argsort(dim=-1, descending=True, stable=True)
    mask_NH = torch.zeros_like(score_NH, dtype=torch.bool).scatter_(-1, order_NH[:, :k], True)
    return Selection(mask_NH, score_NH.gather(-1, order_NH[:, k - 1 : k]).squeeze(-1))


def select_neurons(gate_NH: torch.Tensor, k: int, group: dist.ProcessGroup | None = None) -> Selection:
    """Keep the k neurons of each row with the largest |gate|; among equals the lower neuron index wins.

    gate_NH: [N, h] the gate *after* its activation. SiLU(-8) is nearly 0 and loses to SiLU(0.5).
    k: neurons to keep, 1 <= k <= H, counted over all ranks of `group`.
    group: ranks that hold the expert's neurons in order, h each; None: all are here. Each rank sends its best
        min(k, h) scores and all agree on one threshold; the tokens must be the same on every rank.

    Raises ValueError if k is out of range.
    """
    ranks = 1 if group is None else dist.get_world_size(group)
    rows, neurons = gate_NH.shape
    if not 1 <= k <= neurons * ranks:
        raise ValueError(f"k={k}: must be between 1 and the number of neurons, {neurons * ranks}")
    score_NH = gate_NH.detach().abs()
    candidates_NC = score_NH.topk(min(k, neurons), dim=-1, sorted=False).values
    if ranks == 1:
        threshold_N1 = candidates_NC.amin(-1, keepdim=True)
        wanted_N1 = k - (candidates_NC > threshold_N1).sum(-1, keepdim=True)
    else:
        gathered_RNC = [torch.empty_like(candidates_NC) for _ in range(ranks)]
        dist.all_gather(gathered_RNC, candidates_NC.contiguous(), group=group)
        all_NRC = torch.stack(gathered_RNC, dim=1)
        threshold_N1 = all_NRC.flatten(1).topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        wanted_N1 = k - (all_NRC > threshold_N1[:, :, None]).sum((1, 2))[:, None]
        # Ties on lower ranks come first. A rank whose candidates were cut short has enough of them for all that is wanted.
        equal_NR = (all_NRC == threshold_N1[:, :, None]).sum(-1)
        wanted_N1 = wanted_N1 - equal_NR[:, : dist.get_rank(group)].sum(-1, keepdim=True)
    equal_NH = score_NH == threshold_N1
    mask_NH = (score_NH > threshold_N1) | (equal_NH & (equal_NH.cumsum(-1) <= wanted_N1))
    return Selection(mask_NH, threshold_N1.squeeze(-1))
