"""Loss that balances the load among the neurons of an expert (NG-LBL).

    balance = Balance("normalised")
    sizes_EH = neuron_sizes(active_NH, mask_NH, counts_E, balance)         # the expert backends compute it
    share = neuron_balance_loss(sizes_EH=sizes_EH, load_EH=load_EH, tokens_per_expert_E=counts_E, k=k, stride=balance.stride)
    output = MoEAuxLossAutoScaler.apply(output, coeff * share * data_parallel_size)

The formula, for expert i with tokens B_i, T_i = |B_i|, mask m and activated gate G:

    f_ij = H / (K T_i) sum_{x in B_i} m_xij                  share of neuron j in the load; no gradient, mean 1 over j
    P_ij = 1/T_i sum_{x in B_i} p_xij                        with the size p by form:
           normalised  |G_ij(x)| / sum_l |G_il(x)|           the default: shrinking W_gate does not change it
           unmasked    |G_ij(x)|
           masked      m_xij |G_ij(x)|
    L = mean over experts with T_i > 0 of sum_j f_ij P_ij

B_i is every token that reaches expert i from all data- and expert-parallel ranks, so value and gradient do not depend on
the layout. With stride S > 1, P_ij is the mean over every S-th token of B_i on each rank instead.

Shapes: N rows sorted by local expert, E local experts, H neurons of the whole expert, h on this rank.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad


class Balance(NamedTuple):
    """Which sizes of neurons the loss reads."""

    form: str = "normalised"
    """One of `mone_model.config.NEURON_BALANCE_FORMS`."""
    stride: int = 1
    """Of each expert's tokens on this rank, read every stride-th."""


def sum_by_expert(values_NH: torch.Tensor, tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
    """Add the rows of each expert: [N, h], sorted by expert -> [E, h] in the dtype of values."""
    experts = len(tokens_per_expert_E)
    expert_N = torch.arange(experts, device=values_NH.device).repeat_interleave(
        tokens_per_expert_E, output_size=values_NH.size(0)
    )
    return values_NH.new_zeros(experts, values_NH.size(1)).index_add(0, expert_N, values_NH)


def neuron_sizes(
    active_NH: torch.Tensor,
    mask_NH: torch.Tensor,
    tokens_per_expert_E: torch.Tensor,
    balance: Balance,
    tensor_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """[E, h] sum of p over the sampled rows of each expert, in fp32, differentiable with respect to `active_NH`.

    active_NH: [N, h] activated gates. mask_NH: [N, h] bool, the neurons kept. tokens_per_expert_E: [E] integers, sum N.
    tensor_group: ranks that hold the other neurons of the same experts and see the same tokens.
    """
    if balance.stride > 1:
        starts_E = tokens_per_expert_E.cumsum(0) - tokens_per_expert_E
        first_N = starts_E.repeat_interleave(tokens_per_expert_E, output_size=active_NH.size(0))
        sampled_N = (torch.arange(active_NH.size(0), device=active_NH.device) - first_N) % balance.stride == 0
        active_NH, mask_NH = active_NH[sampled_N], mask_NH[sampled_N]
        tokens_per_expert_E = sampled(tokens_per_expert_E, balance.stride)
    size_NH = active_NH.float().abs()
    if balance.form == "normalised":
        total_N1 = size_NH.sum(-1, keepdim=True)
        if tensor_group is not None and dist.get_world_size(tensor_group) > 1:
            total_N1 = dist_grad.all_reduce(total_N1, group=tensor_group)
        size_NH = size_NH / total_N1.clamp_min(torch.finfo(torch.float32).tiny)
    elif balance.form == "masked":
        size_NH = size_NH * mask_NH
    elif balance.form != "unmasked":
        raise ValueError(f"form={balance.form}: choose normalised, unmasked or masked")
    return sum_by_expert(size_NH, tokens_per_expert_E)


def sampled(tokens_per_expert_E: torch.Tensor, stride: int) -> torch.Tensor:
    """[E] how many of so many tokens are read."""
    return (tokens_per_expert_E + stride - 1) // stride


def neuron_balance_loss(
    *,
    sizes_EH: torch.Tensor,
    load_EH: torch.Tensor,
    tokens_per_expert_E: torch.Tensor,
    k: int,
    stride: int = 1,
    data_group: dist.ProcessGroup | None = None,
    expert_group: dist.ProcessGroup | None = None,
    tensor_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """This rank's share of L: a scalar whose sum over all ranks of the three groups is the loss, without coefficient.

    sizes_EH: [E, h] of `neuron_sizes`, with gradient. load_EH: [E, h] in how many rows each neuron was kept.
    tokens_per_expert_E: [E] integers.
    k: neurons kept per token. stride: of the sizes' `Balance`.
    data_group: ranks that hold the same experts and see other tokens. expert_group: ranks that hold other experts.
    tensor_group: ranks that hold the other neurons of the same experts and see the same tokens.
    """
    with torch.no_grad():
        tokens_E2 = torch.stack([tokens_per_expert_E, sampled(tokens_per_expert_E, stride)], dim=1).float()
        counts_EC = torch.cat([load_EH, tokens_E2], dim=1)
        if data_group is not None:
            dist.all_reduce(counts_EC, group=data_group)
        load_EH, tokens_E1, sampled_E1 = counts_EC.split([load_EH.size(1), 1, 1], dim=1)
        used_experts = (tokens_E1 > 0).sum().float()
        if expert_group is not None:
            dist.all_reduce(used_experts, group=expert_group)
        neurons = sizes_EH.size(1) * (1 if tensor_group is None else dist.get_world_size(tensor_group))
        f_EH = load_EH * (neurons / (k * tokens_E1.clamp_min(1)))
    p_EH = sizes_EH / sampled_E1.clamp_min(1)
    return (f_EH * p_EH).sum() / used_experts.clamp_min(1)
