"""A bias per neuron that balances the load among the neurons of an expert without a loss.

    score_ij = |G_ij(x)| + b_ij          selects the neurons; the values do not change, and b has no gradient

After each optimizer step, a neuron that was kept less often than the mean of its expert gets a larger bias, and one that was
kept more often a smaller one, as DeepSeek-V3 does for experts (arXiv 2408.15664):

    b_ij <- b_ij + rate * sign(mean_l load_il - load_ij)

Only differences within an expert matter, so each expert's smallest bias is 0. Scores are then not negative.

Shapes: E local experts, H neurons of the whole expert, h on this rank.
"""

import torch
import torch.distributed as dist


@torch.no_grad()
def update_neuron_bias(
    bias_EH: torch.Tensor,
    load_EH: torch.Tensor,
    tokens_E: torch.Tensor,
    *,
    k: int,
    neurons: int,
    rate: float,
    data_group: dist.ProcessGroup | None = None,
    tensor_group: dist.ProcessGroup | None = None,
) -> None:
    """Change the bias [E, h] after a step; a collective on the ranks of both groups.

    load_EH: [E, h] in how many rows each neuron was kept. tokens_E: [E] rows of each expert. k: neurons kept per row.
    neurons: H. rate: size of the change, in units of |G|.
    data_group: ranks that hold the same experts and see other tokens. tensor_group: ranks that hold the other neurons of the
    same experts and see the same tokens.
    """
    counts_EC = torch.cat([load_EH, tokens_E[:, None]], dim=1).double()
    if data_group is not None:
        dist.all_reduce(counts_EC, group=data_group)
    # Integers: the sign is exact, and so the same on every layout.
    bias_EH += rate * (k * counts_EC[:, -1:] - neurons * counts_EC[:, :-1]).sign().to(bias_EH.dtype)
    smallest_E1 = bias_EH.amin(1, keepdim=True)
    if tensor_group is not None:
        dist.all_reduce(smallest_E1, op=dist.ReduceOp.MIN, group=tensor_group)
    bias_EH -= smallest_E1
