"""Loss that balances the load among the neurons of an expert (NG-LBL).

    share = neuron_balance_loss(gate_NH=gate_NH, mask_NH=mask_NH, load_EH=load_EH, tokens_per_expert_E=counts_E, k=k)
    output = MoEAuxLossAutoScaler.apply(output, coeff * share * data_parallel_size)

The formula, for expert i with tokens B_i, T_i = |B_i|, mask m and activated gate G:

    f_ij = H / (K T_i) sum_{x in B_i} m_xij                  share of neuron j in the load; no gradient, mean 1 over j
    P_ij = 1/T_i sum_{x in B_i} p_xij                        with p by form:
           normalised  |G_ij(x)| / sum_l |G_il(x)|           the default: shrinking W_gate does not change it
           unmasked    |G_ij(x)|
           masked      m_xij |G_ij(x)|
    L = mean over experts with T_i > 0 of sum_j f_ij P_ij

B_i is every token that reaches expert i from all data- and expert-parallel ranks, so value and gradient do not depend on
the layout. Shapes: N rows sorted by local expert, E local experts, H neurons of the whole expert, h on this rank.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad


def sum_by_expert(values_NH: torch.Tensor, tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
    """Add the rows of each expert: [N, h], sorted by expert -> [E, h] in the dtype of values."""
    experts = len(tokens_per_expert_E)
    expert_N = torch.arange(experts, device=values_NH.device).repeat_interleave(
        tokens_per_expert_E, output_size=values_NH.size(0)
    )
    return values_NH.new_zeros(experts, values_NH.size(1)).index_add(0, expert_N, values_NH)


def neuron_balance_loss(
    *,
    gate_NH: torch.Tensor,
    mask_NH: torch.Tensor,
    load_EH: torch.Tensor,
    tokens_per_expert_E: torch.Tensor,
    k: int,
    form: str = "normalised",
    data_group: dist.ProcessGroup | None = None,
    expert_group: dist.ProcessGroup | None = None,
    tensor_group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """This rank's share of L: a scalar whose sum over all ranks of the three groups is the loss, without coefficient.

    gate_NH: [N, h] activated gate, with gradient. mask_NH: [N, h] bool. load_EH: [E, h] its sums by expert.
    tokens_per_expert_E: [E] integers, sum N.
    k: neurons kept per token. form: normalised, unmasked or masked.
    data_group: ranks that hold the same experts and see other tokens. expert_group: ranks that hold other experts.
    tensor_group: ranks that hold the other neurons of the same experts and see the same tokens.
    """
    size_NH = gate_NH.float().abs()
    if form == "normalised":
        total_N1 = size_NH.sum(-1, keepdim=True)
        if tensor_group is not None and dist.get_world_size(tensor_group) > 1:
            total_N1 = dist_grad.all_reduce(total_N1, group=tensor_group)
        size_NH = size_NH / total_N1.clamp_min(torch.finfo(torch.float32).tiny)
    elif form == "masked":
        size_NH = size_NH * mask_NH
    elif form != "unmasked":
        raise ValueError(f"form={form}: choose normalised, unmasked or masked")

    with torch.no_grad():
        counts_EC = torch.cat([load_EH, tokens_per_expert_E[:, None].float()], dim=1)
        if data_group is not None:
            dist.all_reduce(counts_EC, group=data_group)
        load_EH, tokens_E1 = counts_EC[:, :-1], counts_EC[:, -1:]
        used_experts = (tokens_E1 > 0).sum().float()
        if expert_group is not None:
            dist.all_reduce(used_experts, group=expert_group)
        neurons = gate_NH.size(1) * (1 if tensor_group is None else dist.get_world_size(tensor_group))
        tokens_E1 = tokens_E1.clamp_min(1)
        f_EH = load_EH * (neurons / (k * tokens_E1))
    p_EH = sum_by_expert(size_NH, tokens_per_expert_E) / tokens_E1
    return (f_EH * p_EH).sum() / used_experts.clamp_min(1)
