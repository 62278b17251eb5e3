"""Select the top-K neurons of each token in each expert (arXiv 2510.05781).

    gate_NH = act(x_ND @ w_gate)                     # every neuron of the expert, dense
    kept = select_neurons(gate_NH, k)                # S(x) = argtop-K_j |gate_j|
    hidden_NH = gate_NH * up_NH * kept.mask_NH * probs_N1       # dropped neurons contribute no value and no gradient

    hidden_NH = select_and_gate(x_ND @ w_gate, x_ND @ w_up, probs_N, k).hidden_NH      # the same in one operator

Shapes: N rows (a token in one of its experts), H neurons of the whole expert, h neurons on this rank (h = H without
expert-tensor parallelism), K kept, W = ceil(H / 16) words of a packed mask.
"""

import importlib.util
import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mone_model.activations import ACTIVATIONS
from mone_model.kernels.cpu import selection as cpu


class TopK(NamedTuple):
    """Keep the `k` neurons of each row with the largest |act(gate)|."""

    k: int
    group: dist.ProcessGroup | None = None
    """Ranks that share the expert's neurons equally, in order; None: all are here."""

    def keeps_all(self, neurons: int) -> bool:
        """Whether nothing is dropped, with so many neurons of the expert on this rank: a plain MoE."""
        return self.k == neurons * (1 if self.group is None else dist.get_world_size(self.group))


class Selection(NamedTuple):
    """Which neurons were kept."""

    mask_NH: torch.Tensor
    """[N, h] bool, exactly K true per row over all ranks of the expert."""
    threshold_N: torch.Tensor
    """[N] the K-th largest score of the row, which is the smallest kept; infinity in place of NaN."""


def scores_of(gate: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """|gate| + bias, the score of each neuron, without a gradient. NaN becomes infinity, so that exactly K are kept."""
    score = gate.detach().abs().nan_to_num_(nan=math.inf, posinf=math.inf)
    return score if bias is None else score.float() + bias


def select_neurons_reference(gate_NH: torch.Tensor, k: int) -> Selection:
    """Reference for `select_neurons`, by a stable sort. Every faster form must give the same mask, ties included."""
    score_NH = scores_of(gate_NH)
    order_NH = score_NH.argsort(dim=-1, descending=True, stable=True)
    mask_NH = torch.zeros_like(score_NH, dtype=torch.bool).scatter_(-1, order_NH[:, :k], True)
    return Selection(mask_NH, score_NH.gather(-1, order_NH[:, k - 1 : k]).squeeze(-1))


def select_neurons(
    gate_NH: torch.Tensor, k: int, group: dist.ProcessGroup | None = None, bias_NH: torch.Tensor | None = None
) -> Selection:
    """Keep the k neurons of each row with the largest |gate| + bias. NaN counts as infinity. Ties go to the lower index.

    gate_NH: [N, h] the gate *after* its activation. SiLU(-8) is nearly 0 and loses to SiLU(0.5).
    k: neurons to keep, 1 <= k <= H, counted over all ranks of `group`.
    group: ranks that hold the expert's neurons in order, h each; None: all are on this rank. Each rank sends its
        min(k, h) largest scores, and all ranks compute the same threshold. The tokens must be the same on every rank.
    bias_NH: [N, h] fp32; None: 0.

    Raises ValueError if k is out of range.
    """
    return select_best(scores_of(gate_NH, bias_NH), k, group)


def select_best(score_NH: torch.Tensor, k: int, group: dist.ProcessGroup | None = None) -> Selection:
    """Like `select_neurons` by a score [N, h] without NaN, in place of |gate|."""
    ranks = 1 if group is None else dist.get_world_size(group)
    rows, neurons = score_NH.shape
    if not 1 <= k <= neurons * ranks:
        raise ValueError(f"k={k}: must be between 1 and the number of neurons, {neurons * ranks}")
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
        # Ties on lower ranks come first. A rank that sent only k candidates sent enough ties for all that are wanted.
        equal_NR = (all_NRC == threshold_N1[:, :, None]).sum(-1)
        wanted_N1 = wanted_N1 - equal_NR[:, : dist.get_rank(group)].sum(-1, keepdim=True)
    equal_NH = score_NH == threshold_N1
    mask_NH = (score_NH > threshold_N1) | (equal_NH & (equal_NH.cumsum(-1) <= wanted_N1))
    return Selection(mask_NH, threshold_N1.squeeze(-1))


class Gated(NamedTuple):
    """Hidden activations, and which neurons they come from."""

    hidden_NH: torch.Tensor
    """[N, H] act(gate) * up * prob of the neurons kept, zero elsewhere."""
    masks_NW: torch.Tensor
    """[N, W] int16: bit j % 16 of word j // 16 is neuron j; `unpack` reads it."""
    threshold_N: torch.Tensor
    """[N] fp32: the K-th largest |act(gate)| of the row; infinity in place of NaN."""


def select_and_gate_reference(
    gate_NH: torch.Tensor, up_NH: torch.Tensor, probs_N: torch.Tensor, k: int, activation: str = "silu"
) -> Gated:
    """Reference for `select_and_gate`, differentiated by autograd."""
    kept = select_neurons_reference(_activate(gate_NH, activation), k)
    # Zero dropped neurons before the product: 0 times NaN is NaN.
    gate_NH, up_NH = (tensor.masked_fill(~kept.mask_NH, 0) for tensor in (gate_NH, up_NH))
    hidden_NH = _activate(gate_NH, activation) * up_NH.float() * probs_N.float()[:, None]
    return Gated(hidden_NH.to(gate_NH.dtype), pack(kept.mask_NH), kept.threshold_N)


def select_and_gate(
    gate_NH: torch.Tensor, up_NH: torch.Tensor, probs_N: torch.Tensor, k: int, activation: str = "silu"
) -> Gated:
    """Activate the gate, keep the k neurons of each row with the largest |act(gate)|, multiply them by up and weight.

    gate_NH, up_NH: [N, H] *before* the activation, of the same dtype. Computation is in fp32. probs_N: [N] routing weights.
    k: neurons to keep, 1 <= k <= H. NaN counts as infinity. Ties go to the lower index.

    The result is differentiable with respect to the first three arguments. For the backward pass it saves gate and up of
    the k neurons, and one bit for each of the H. act(-inf) is the limit 0, where torch's SiLU and GELU give NaN.

    Raises ValueError if k is out of range.
    """
    if not 1 <= k <= gate_NH.size(1):
        raise ValueError(f"k={k}: must be between 1 and the number of neurons, {gate_NH.size(1)}")
    hidden_NH, masks_NW, _, _, threshold_N = torch.ops.mone.select_and_gate(gate_NH, up_NH, probs_N, k, activation)
    return Gated(hidden_NH, masks_NW, threshold_N)


# Replaces infinity, which torch's activations and their gradients would multiply by 0.
_LARGEST = torch.finfo(torch.float32).max


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) in fp32."""
    return ACTIVATIONS[activation].function(gate.float().clamp_min(-_LARGEST))


def pack(mask_NH: torch.Tensor) -> torch.Tensor:
    """[N, H] bool -> [N, W] int16 words, neuron 0 in the lowest bit of the first."""
    rows, neurons = mask_NH.shape
    bits_NW = torch.nn.functional.pad(mask_NH, (0, -neurons % 16)).view(rows, -(-neurons // 16), 16).int()
    return (bits_NW << torch.arange(16, dtype=torch.int32, device=mask_NH.device)).sum(-1).to(torch.int16)


def unpack(masks_NW: torch.Tensor, neurons: int) -> torch.Tensor:
    """[N, W] int16 words -> [N, H] bool."""
    # A table of the eight flags of each byte, as one int64: shifts of whole masks take four times their memory.
    bytes_256, bits_8 = (torch.arange(count, dtype=torch.uint8, device=masks_NW.device) for count in (256, 8))
    flags_256 = ((bytes_256[:, None] >> bits_8) & 1).view(torch.int64).flatten()
    return flags_256[masks_NW.contiguous().view(torch.uint8).int()].view(torch.bool)[:, :neurons]


def _kernels_for(tensor: torch.Tensor) -> Any:
    """The kernels for this tensor; None: use torch's operations."""
    if tensor.device.type == "cpu":
        return cpu if cpu.selects(tensor) else None
    if importlib.util.find_spec("triton") is None:
        return None
    from mone_model.kernels.triton import selection as triton

    return triton if triton.selects(tensor) else None


@torch.library.custom_op("mone::select_and_gate", mutates_args=())
def _select_and_gate(
    gate: torch.Tensor, up: torch.Tensor, probs: torch.Tensor, k: int, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if kernels := _kernels_for(gate):
        return kernels.select_and_gate(gate, up, probs, k, activation)
    active = _activate(gate, activation)
    mask, threshold = select_neurons(active, k)
    hidden = (active * up.float() * probs.float()[:, None]).masked_fill_(~mask, 0).to(gate.dtype)
    return hidden, pack(mask), gate[mask].view(-1, k), up[mask].view(-1, k), threshold


@_select_and_gate.register_fake
def _(gate: torch.Tensor, up: torch.Tensor, probs: torch.Tensor, k: int, activation: str) -> tuple[torch.Tensor, ...]:
    rows, neurons = gate.shape
    return (
        gate.new_empty(rows, neurons),
        gate.new_empty(rows, -(-neurons // 16), dtype=torch.int16),
        gate.new_empty(rows, k),
        gate.new_empty(rows, k),
        gate.new_empty(rows, dtype=torch.float32),
    )


@torch.library.custom_op("mone::select_and_gate_backward", mutates_args=())
def _select_and_gate_backward(
    dhidden: torch.Tensor, masks: torch.Tensor, gates: torch.Tensor, ups: torch.Tensor, probs: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if kernels := _kernels_for(dhidden):
        return kernels.select_and_gate_backward(dhidden, masks, gates, ups, probs, activation)
    mask = unpack(masks, dhidden.size(1))
    dkept, kept_up, weight = dhidden[mask].view_as(gates).float(), ups.float(), probs.float()[:, None]
    kept_gate = gates.float().clamp(-_LARGEST, _LARGEST)
    active = _activate(gates, activation)
    dkept_gate = ACTIVATIONS[activation].gradient(dkept * kept_up * weight, kept_gate)
    dgate, dup = torch.zeros_like(dhidden), torch.zeros_like(dhidden)
    dgate[mask] = dkept_gate.flatten().to(dgate.dtype)
    dup[mask] = (dkept * active * weight).flatten().to(dup.dtype)
    return dgate, dup, (dkept * active * kept_up).sum(-1).to(probs.dtype)


@_select_and_gate_backward.register_fake
def _(dhidden: torch.Tensor, masks: Any, gates: Any, ups: Any, probs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(dhidden), torch.empty_like(dhidden), torch.empty_like(probs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, probs, _, ctx.activation = inputs
    _, masks, gates, ups, threshold = output
    ctx.mark_non_differentiable(masks, gates, ups, threshold)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(masks, gates, ups, probs)


def _differentiate(ctx: Any, dhidden: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if dhidden is None:
        return (None,) * 5
    return (*torch.ops.mone.select_and_gate_backward(dhidden, *ctx.saved_tensors, ctx.activation), None, None)


_select_and_gate.register_autograd(_differentiate, setup_context=_save)
