"""Counters of neuron use: on the device while training, reduced over ranks only when reported.

    counters = NeuronCounters(experts=4, neurons=512, device=device)       # one per layer, for the experts of this rank
    counters.add(tokens_per_expert_E=..., threshold_N=..., selected_EH=..., magnitude_EH=...)
    usage = reduce_counters(...)                                             # every layer and expert, all ranks
    summarise_neurons(usage, model.active_neurons_by_layer)                  # dead share, entropy, Gini, overlap

Shapes: L layers, E experts of the model, e on this rank, H neurons of an expert, h on this rank, N rows sorted by expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mone_model.neuron_balance import sum_by_expert


class NeuronCounters:
    """Sums over the tokens that the experts of one layer on this rank computed since the last `reset`."""

    def __init__(self, experts: int, neurons: int, device: torch.device) -> None:
        # float64 holds exact counts beyond the 16M tokens where float32 stops counting.
        self.tokens_E = torch.zeros(experts, dtype=torch.float64, device=device)
        self.threshold_E = torch.zeros(experts, dtype=torch.float64, device=device)
        self.selected_EH = torch.zeros(experts, neurons, dtype=torch.float64, device=device)
        self.magnitude_EH = torch.zeros(experts, neurons, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        *,
        tokens_per_expert_E: torch.Tensor,
        threshold_N: torch.Tensor,
        selected_EH: torch.Tensor,
        magnitude_EH: torch.Tensor,
    ) -> None:
        """Count one micro-batch.

        threshold_N: [N] the K-th largest |gate| of each row. selected_EH: [E, h] how often each neuron was kept.
        magnitude_EH: [E, h] sum of its |gate| over the expert's rows, kept or not.
        """
        self.tokens_E += tokens_per_expert_E
        self.threshold_E += sum_by_expert(threshold_N[:, None].float(), tokens_per_expert_E)[:, 0]
        self.selected_EH += selected_EH
        self.magnitude_EH += magnitude_EH

    def reset(self) -> None:
        """Set all counters to zero."""
        for counter in (self.tokens_E, self.threshold_E, self.selected_EH, self.magnitude_EH):
            counter.zero_()


@dataclass(frozen=True)
class NeuronUsage:
    """The counters of all layers and experts, reduced over all ranks, on the CPU."""

    tokens_LE: torch.Tensor
    """[L, E] tokens that each expert computed."""
    threshold_LE: torch.Tensor
    """[L, E] mean of the realised K-th |gate|; 0 for an expert without tokens."""
    selected_LEH: torch.Tensor
    """[L, E, H] how often each neuron was kept."""
    magnitude_LEH: torch.Tensor
    """[L, E, H] mean |gate| over the expert's tokens, kept or not."""


def reduce_counters(
    counters: dict[int, NeuronCounters],
    *,
    num_layers: int,
    num_experts: int,
    num_neurons: int,
    expert_rank: int = 0,
    expert_tensor_rank: int = 0,
) -> NeuronUsage:
    """Reduce the counters of all ranks; a collective on every rank.

    counters: those of this rank, by layer index from 0.

    Each rank writes its part into a zero tensor of the whole model, and all are added. Replicas see different tokens, so
    their counts add up. Ranks that share the neurons of an expert see the same tokens, so only the first counts tokens.
    """
    width = 2 + 2 * num_neurons
    device = next(iter(counters.values())).tokens_E.device if counters else torch.device("cpu")
    whole_LEC = torch.zeros(num_layers, num_experts, width, dtype=torch.float64, device=device)
    for layer, counter in counters.items():
        experts, neurons = counter.selected_EH.shape
        rows = slice(expert_rank * experts, (expert_rank + 1) * experts)
        place = whole_LEC[layer, rows]
        if expert_tensor_rank == 0:
            place[:, 0], place[:, 1] = counter.tokens_E, counter.threshold_E
        first = 2 + expert_tensor_rank * neurons
        place[:, first : first + neurons] = counter.selected_EH
        place[:, first + num_neurons : first + num_neurons + neurons] = counter.magnitude_EH
    if dist.is_initialized():
        dist.all_reduce(whole_LEC)
    tokens_LE, threshold_LE, selected_LEH, magnitude_LEH = whole_LEC.cpu().split([1, 1, num_neurons, num_neurons], dim=-1)
    counted_LE1 = tokens_LE.clamp_min(1)
    return NeuronUsage(tokens_LE[..., 0], (threshold_LE / counted_LE1)[..., 0], selected_LEH, magnitude_LEH / counted_LE1)


def _entropy(share: torch.Tensor) -> torch.Tensor:
    """Entropy over the last axis, divided by that of the uniform distribution: 1 is balanced, 0 is all in one entry."""
    size = share.size(-1)
    if size == 1:
        return torch.ones(share.shape[:-1], dtype=share.dtype)
    return torch.special.entr(share).sum(-1) / torch.log(torch.tensor(float(size), dtype=share.dtype))


def _shares(counts: torch.Tensor) -> torch.Tensor:
    return counts / counts.sum(-1, keepdim=True).clamp_min(1e-12)


def gini(counts: torch.Tensor) -> torch.Tensor:
    """Gini coefficient over the last axis (n entries): 0 is balanced, (n-1)/n is all in one entry.

    sum_i (2 i - n - 1) c_(i) / (n sum c), with c_(i) sorted ascending, i from 1.
    """
    n = counts.size(-1)
    rank = torch.arange(1, n + 1, dtype=counts.dtype)
    weighted = ((2 * rank - n - 1) * counts.sort(dim=-1).values).sum(-1)
    return weighted / (n * counts.sum(-1)).clamp_min(1e-12)


def top_neuron_overlap(selected_EH: torch.Tensor, k: int) -> float:
    """Mean share of the most used neuron indices that two experts have in common, over pairs of experts with tokens.

    2 |T_a & T_b| / (|T_a| + |T_b|), where T_e is the set of the k neurons that expert e kept most often. Ties go to the
    lower index. Neurons that were never kept are not in the set. Independent experts have k/H in common on average; 1 means
    that all experts use the same indices. NaN if fewer than two experts have tokens.

    selected_EH: [E, H] how often each neuron was kept.
    """
    used_EH = selected_EH[selected_EH.sum(-1) > 0]
    experts = len(used_EH)
    if experts < 2:
        return float("nan")
    first_EK = used_EH.argsort(dim=-1, descending=True, stable=True)[:, :k]
    top_EH = torch.zeros_like(used_EH).scatter_(-1, first_EK, 1.0) * (used_EH > 0)
    size_E = top_EH.sum(-1)
    common_EE = 2 * (top_EH @ top_EH.T) / (size_E[:, None] + size_E)
    return float((common_EE.sum() - common_EE.diagonal().sum()) / (experts * (experts - 1)))


def summarise_experts(usage: NeuronUsage) -> dict[str, torch.Tensor]:
    """Per layer [L]: `load_max` and `load_min` over the mean load, `load_entropy` (1 is balanced)."""
    share_LE = _shares(usage.tokens_LE)
    experts = share_LE.size(-1)
    return {
        "load_max": share_LE.amax(-1) * experts,
        "load_min": share_LE.amin(-1) * experts,
        "load_entropy": _entropy(share_LE),
    }


def summarise_neurons(usage: NeuronUsage, k_L: Sequence[int]) -> dict[str, torch.Tensor]:
    """Per layer [L], means over experts with tokens: dead share, usage entropy, Gini, overlap, |gate|, threshold.

    A neuron is dead when its expert had tokens and none of them kept it. k_L: neurons that a token keeps in each layer.
    """
    active_LE = usage.tokens_LE > 0

    def over_experts(values_LE: torch.Tensor) -> torch.Tensor:
        return (values_LE * active_LE).sum(-1) / active_LE.sum(-1).clamp_min(1)

    return {
        "dead": over_experts((usage.selected_LEH == 0).double().mean(-1)),
        "usage_entropy": over_experts(_entropy(_shares(usage.selected_LEH))),
        "usage_gini": over_experts(gini(usage.selected_LEH)),
        "overlap": torch.tensor([top_neuron_overlap(layer, k) for layer, k in zip(usage.selected_LEH, k_L, strict=True)]),
        "gate_magnitude": over_experts(usage.magnitude_LEH.mean(-1)),
        "threshold": over_experts(usage.threshold_LE),
    }
