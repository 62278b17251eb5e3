"""Experts behind one protocol, `ExpertBackend`, and the choice of the fastest backend on this machine.

    backend = BACKENDS["grouped"]
    weights = backend.prepare(gate_up_E2HD, down_EHD)
    y_ND = backend.compute(weights, x_ND, tokens_E, probs_N, Request(TopK(128), "silu")).out_ND

grouped  one grouped GEMM for the gates and ups of all experts, one for down; neurons are selected between them
loop     the same with one GEMM for each expert: what the others must equal
sparse   (CPU, fp32) gates as above; up, down and the backward pass only of the neurons that are kept
decode   (no gradients) for a few rows: reads up and down only of the neurons that are kept

`compute.experts` chooses among the first three; `auto` measures them. Inference uses `decode` for few rows.

To add one, write an `ExpertBackend`, a row in `BACKENDS`, and its name in `mone_model.config.EXPERT_BACKENDS`. If not all
configurations support it, refuse the others in `choose_backend`; if `auto` is to try it, add it to `measure`.
`tests/unit/test_experts.py` compares every backend with `loop`.

Shapes: N rows (a token in one of its experts) sorted by expert, D model width, E experts, H neurons of an expert, h of them
on this rank.
"""

import functools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mone_common.checks import check
from mone_model.activations import ACTIVATIONS
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig, why_not_sparse
from mone_model.kernels.cpu import experts as cpu
from mone_model.kernels.cpu import library
from mone_model.neuron_balance import Balance, neuron_sizes, sum_by_expert
from mone_model.neuron_score import score_neurons
from mone_model.neuron_selection import Selection, TopK, scores_of, select_and_gate, select_best, unpack
from mone_model.thresholds import AtLeast

Rule = TopK | AtLeast
"""Which neurons a row keeps."""


class Weights(NamedTuple):
    """The experts' weights, neuron-major: the weights of one neuron lie together."""

    gate_up_E2HD: torch.Tensor
    """[E, 2, h, D] gates, then ups."""
    down_EHD: torch.Tensor
    """[E, h, D]"""


class ExpertOutput(NamedTuple):
    """What the experts computed. All but `out_ND` is None unless it was asked for."""

    out_ND: torch.Tensor
    """[N, D] outputs times routing weights."""
    sizes_EH: torch.Tensor | None = None
    """[E, h] `mone_model.neuron_balance.neuron_sizes`, differentiable; with `balance`."""
    load_EH: torch.Tensor | None = None
    """[E, h] how often each neuron was kept; with `balance` or `counting`."""
    threshold_N: torch.Tensor | None = None
    """[N] the smallest score kept; with `counting`."""
    magnitude_EH: torch.Tensor | None = None
    """[E, h] sum of |gate| over the rows of an expert, kept or not; with `counting`."""


class Request(NamedTuple):
    """How the experts are to be computed."""

    rule: Rule
    """Which neurons a row keeps."""
    activation: str
    """Gate activation, a key of `mone_model.activations.ACTIVATIONS`."""
    counting: bool = False
    """Whether to return what `NeuronCounters` count."""
    balance: Balance | None = None
    """Which sizes of neurons to return for the balance loss; None: none."""
    score: str = "abs_gate"
    """By which score `TopK` selects (`mone_model.neuron_score`); others than abs_gate by `grouped` and `loop` only."""
    frozen_EHD: torch.Tensor | None = None
    """[E, h, D] `mone_model.neuron_score.frozen_projection`, for score=frozen."""
    bias_EH: torch.Tensor | None = None
    """[E, h] fp32, not negative: added to |gate| in the score by which the rule selects. It changes no value."""


class ExpertBackend(ABC):
    """One way to compute the experts of a layer on one rank."""

    def prepare(self, gate_up_E2HD: torch.Tensor, down_EHD: torch.Tensor) -> Weights:
        """[E, 2, h, D] and [E, h, D] weights in the form that `compute` reads; without a copy where that is possible."""
        return Weights(gate_up_E2HD, down_EHD)

    @abstractmethod
    def compute(
        self, weights: Weights, x_ND: torch.Tensor, tokens_E: torch.Tensor, probs_N: torch.Tensor, request: Request
    ) -> ExpertOutput:
        """The experts' outputs for rows sorted by expert.

        x_ND: [N, D]. tokens_E: [E] int64, rows of each expert. probs_N: [N] routing weights.
        """


class Dense(ExpertBackend):
    """Gates and ups of all neurons, the product with dropped ones masked: `grouped` and `loop`."""

    def __init__(self, gemm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.gemm = gemm

    def compute(
        self, weights: Weights, x_ND: torch.Tensor, tokens_E: torch.Tensor, probs_N: torch.Tensor, request: Request
    ) -> ExpertOutput:
        """See `ExpertBackend`."""
        rule, activation, counting, balance, score, frozen_EHD, bias_EH = request
        act, group = ACTIVATIONS[activation].function, rule.group if isinstance(rule, TopK) else None
        gate_up_EDH = weights.gate_up_E2HD.flatten(1, 2).transpose(1, 2)
        gate_NH, up_NH = self.gemm(x_ND, gate_up_EDH, tokens_E).chunk(2, dim=-1)
        neurons = gate_NH.size(1)
        selecting = isinstance(rule, AtLeast) or not rule.keeps_all(neurons)
        if isinstance(rule, TopK) and group is None and selecting and bias_EH is None and score == "abs_gate":
            hidden_NH, masks_NW, threshold_N = select_and_gate(gate_NH, up_NH, probs_N, rule.k, activation)
            if counting or balance:
                active_NH, mask_NH = act(gate_NH if balance else gate_NH.detach()), unpack(masks_NW, neurons)
        else:
            active_NH = act(gate_NH)
            hidden_NH = (active_NH * up_NH * probs_N[:, None]).to(x_ND.dtype)
            if selecting or counting or balance:
                if score == "abs_gate":
                    score_NH = scores_of(active_NH, rows_of_experts(bias_EH, tokens_E, len(x_ND)))
                else:
                    frozen_NH = None if frozen_EHD is None else self.gemm(x_ND, frozen_EHD.transpose(1, 2), tokens_E)
                    score_NH = score_neurons(score, gate_NH=gate_NH, active_NH=active_NH, up_NH=up_NH, frozen_NH=frozen_NH)
                mask_NH, threshold_N = _select(score_NH, rule)
            if selecting:
                hidden_NH = hidden_NH * mask_NH
        out_ND = self.gemm(hidden_NH, weights.down_EHD, tokens_E)
        output = ExpertOutput(out_ND)
        if balance or counting:
            output = output._replace(load_EH=sum_by_expert(mask_NH.float(), tokens_E))
        if counting:
            magnitude_EH = sum_by_expert(active_NH.detach().float().abs(), tokens_E)
            output = output._replace(threshold_N=threshold_N, magnitude_EH=magnitude_EH)
        if balance:
            output = output._replace(sizes_EH=neuron_sizes(active_NH, mask_NH, tokens_E, balance, group))
        return output


def _select(score_NH: torch.Tensor, rule: Rule) -> Selection:
    if isinstance(rule, AtLeast):
        return Selection(score_NH >= rule.threshold, score_NH.new_full(score_NH.shape[:1], rule.threshold))
    if not rule.keeps_all(score_NH.size(1)):
        return select_best(score_NH, rule.k, rule.group)
    smallest_N = score_NH.amin(-1)
    if rule.group is not None:
        dist.all_reduce(smallest_N, op=dist.ReduceOp.MIN, group=rule.group)
    return Selection(torch.ones_like(score_NH, dtype=torch.bool), smallest_N)


class Sparse(ExpertBackend):
    """Up, down and the backward pass only of the neurons that are kept, by kernels for CPUs in fp32."""

    def compute(
        self, weights: Weights, x_ND: torch.Tensor, tokens_E: torch.Tensor, probs_N: torch.Tensor, request: Request
    ) -> ExpertOutput:
        """See `ExpertBackend`. By thresholds it computes as `loop` does."""
        rule, activation, counting, balance, score, _, bias_EH = request
        assert score == "abs_gate", "the kernels select by |act(gate)|"
        if isinstance(rule, AtLeast):
            return BACKENDS["loop"].compute(weights, x_ND, tokens_E, probs_N, request)
        assert rule.group is None, "the kernels need all neurons of an expert on one rank"
        counted = counting or balance is not None
        kept = cpu.experts(
            x_ND, *weights, probs_N, tokens_E, rule.k, activation, counting=counted, balance=balance, bias_EH=bias_EH
        )
        output = ExpertOutput(kept.out_ND)
        if counted:
            output = output._replace(load_EH=kept.counts_E2H[:, 0])
        if counting:
            output = output._replace(threshold_N=kept.threshold_N, magnitude_EH=kept.counts_E2H[:, 1])
        return output._replace(sizes_EH=kept.sizes_EH) if balance else output


class Decode(ExpertBackend):
    """A few rows without gradients: weights up and down of dropped neurons are not read.

    By kernels for CPUs in fp32 and bf16, and for GPUs in fp32, bf16 and fp16.
    """

    def compute(
        self, weights: Weights, x_ND: torch.Tensor, tokens_E: torch.Tensor, probs_N: torch.Tensor, request: Request
    ) -> ExpertOutput:
        """See `ExpertBackend`. It returns `out_ND` only."""
        rule, activation = request.rule, request.activation
        assert not request.counting, "inference has no counters"
        assert request.balance is None, "inference has no balance loss"
        assert request.score == "abs_gate", "the kernels select by |act(gate)|"
        k, threshold = (rule.k, None) if isinstance(rule, TopK) else (0, rule.threshold)
        kernel, bias_EH = _decode_kernel_for(x_ND), request.bias_EH
        assert bias_EH is None or kernel is cpu.decode, "the kernels for GPUs have no bias"
        more = {} if bias_EH is None else {"bias_EH": bias_EH}
        return ExpertOutput(kernel(x_ND, *weights, probs_N, tokens_E, k, activation, threshold=threshold, **more).out_ND)


def _decode_kernel_for(tensor: torch.Tensor) -> Any:
    """`decode` for tensors of this device."""
    if not tensor.is_cuda:
        return cpu.decode
    from mone_model.kernels.triton import decode as triton

    return triton.decode


def route(
    backend: ExpertBackend,
    weights: Weights,
    x_TD: torch.Tensor,
    experts_Tk: torch.Tensor,
    probs_Tk: torch.Tensor,
    request: Request,
) -> torch.Tensor:
    """[T, D] the sum over the k experts of each token. experts_Tk: their numbers; -1 or E: an expert of another rank."""
    experts = len(weights.down_EHD)
    index_R = experts_Tk.flatten().long()
    index_R = index_R.where(index_R >= 0, experts)
    order_R = index_R.argsort(stable=True)
    tokens_E = torch.bincount(index_R, minlength=experts + 1)
    # Experts of other ranks come last.
    order_R, tokens_E = order_R[: len(order_R) - int(tokens_E[experts])], tokens_E[:experts]
    token_R = order_R // experts_Tk.size(1)
    probs_R = probs_Tk.flatten()[order_R].float()
    out_RD = backend.compute(weights, x_TD[token_R], tokens_E, probs_R, request).out_ND
    return torch.zeros_like(x_TD).index_add_(0, token_R, out_RD.to(x_TD.dtype))


def rows_of_experts(values_EH: torch.Tensor | None, tokens_E: torch.Tensor, rows: int) -> torch.Tensor | None:
    """[N, h] for rows sorted by expert the numbers [h] of their expert; None stays None."""
    return None if values_EH is None else values_EH.repeat_interleave(tokens_E, dim=0, output_size=rows)


def expert_gemm(x_NK: torch.Tensor, weight_EKM: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
    """One grouped GEMM: rows of expert e times weight[e]. [N, K], [E, K, M], [E] -> [N, M]."""
    if len(x_NK) == 0:
        # The grouped GEMM's backward refuses an empty batch; this keeps the weights in the graph.
        return x_NK @ weight_EKM[0]
    offsets_E = tokens_E.cumsum(0).to(device=x_NK.device, dtype=torch.int32)
    return F.grouped_mm(x_NK, weight_EKM, offs=offsets_E)


def expert_gemm_loop(x_NK: torch.Tensor, weight_EKM: torch.Tensor, tokens_E: torch.Tensor) -> torch.Tensor:
    """What `expert_gemm` means: one GEMM for each expert."""
    # Transposed weights are split before they are transposed: their gradients then have the layout of the parameter.
    weights = weight_EKM.unbind() if weight_EKM.is_contiguous() else [weight.T for weight in weight_EKM.mT.unbind()]
    rows = x_NK.split(tokens_E.tolist())
    return torch.cat([x @ weight for x, weight in zip(rows, weights, strict=True)])


BACKENDS: dict[str, ExpertBackend] = {
    "grouped": Dense(expert_gemm),
    "loop": Dense(expert_gemm_loop),
    "sparse": Sparse(),
    "decode": Decode(),
}
DENSE_BACKENDS = ("grouped", "loop")


def choose_backend(model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig) -> str:
    """The backend for these experts on this machine; ValueError if `compute.experts=sparse` cannot run here.

    Switches the CPU kernels of this process on or off, as `compute.cpu_kernels` says.
    """
    library.allowed = compute.cpu_kernels == "auto"
    if compute.experts not in ("auto", "sparse"):
        return compute.experts
    obstacle = why_not_sparse(model, parallel, compute)
    if obstacle is None and torch.cuda.is_available():
        obstacle = "there are no kernels for GPUs"
    if obstacle is None and not library.available():
        obstacle = "its kernels could not be built here"
    if compute.experts == "sparse":
        check(obstacle is None, "compute.experts", "sparse", f"{obstacle}; use compute.experts=auto")
        return "sparse"
    if torch.cuda.is_available():
        return "grouped"
    parts = parallel.expert_tensor
    shape = (model.hidden_size, model.moe_ffn_hidden_size // parts, max(1, model.active_neurons // parts))
    return measure(*shape, model.activation, compute.dtype, sparse=obstacle is None).fastest


@dataclass(frozen=True)
class Measured:
    """Seconds of a forward and backward pass by backend."""

    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """The first backend, unless a later one is faster by more than noise: results depend on it in their rounding."""
        best = next(iter(self.seconds))
        for name, seconds in self.seconds.items():
            if seconds < 0.85 * self.seconds[best]:
                best = name
        return best


@functools.cache
def measure(width: int, neurons: int, k: int, activation: str, dtype: torch.dtype, *, sparse: bool) -> Measured:
    """Time each backend on random experts of this shape, 256 tokens for each; the best of interleaved rounds.

    sparse: time that backend too.
    """
    experts, rows = 4, 256
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).mul_(width**-0.5).requires_grad_()

    tokens_E = torch.full((experts,), rows)
    x_ND, gate_up_E2HD = random(experts * rows, width), random(experts, 2, neurons, width)
    down_EHD = random(experts, neurons, width)
    probs_N = torch.rand(experts * rows, generator=generator).requires_grad_()
    inputs, request = [x_ND, gate_up_E2HD, down_EHD, probs_N], Request(TopK(k), activation)

    seconds = dict.fromkeys([*DENSE_BACKENDS, "sparse"] if sparse else DENSE_BACKENDS, math.inf)
    with torch.enable_grad():
        for _ in range(4):
            for name in seconds:
                start = time.perf_counter()
                backend = BACKENDS[name]
                weights = backend.prepare(gate_up_E2HD, down_EHD)
                out_ND = backend.compute(weights, x_ND, tokens_E, probs_N, request).out_ND
                torch.autograd.grad(out_ND, inputs, torch.ones_like(out_ND))
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return Measured(seconds)


def random_layers(width: int, neurons: int, experts: int, dtype: torch.dtype) -> list[Weights]:
    """Layers of at most so many random experts to measure with, together larger than the caches."""
    size = 3 * neurons * width * dtype.itemsize
    experts = min(experts, 16, max(2, _BEYOND_CACHES // size))
    layers = max(1, min(128, _BEYOND_CACHES // size) // experts)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(width**-0.5).to(dtype)

    first = Weights(random(experts, 2, neurons, width), random(experts, neurons, width))
    return [first, *(Weights(first.gate_up_E2HD.clone(), first.down_EHD.clone()) for _ in range(layers - 1))]


def rows_alike(rows: int, measured: int, experts: int) -> int:
    """The rows in a layer of `experts` experts that are like so many in a layer of the `measured` ones.

    Each expert has as many of them; while no expert has two, they are as many in all.
    """
    return rows if rows < measured else rows * experts // measured


@torch.no_grad()
def measure_max_decode_rows(
    width: int, neurons: int, experts: int, k: int, activation: str, dtype: torch.dtype, backend: str
) -> int:
    """The largest number of rows (tokens times their experts) for which `decode` is faster here than this backend.

    0 if it never is. Both cycle through weights that are larger than the caches, as in generation.
    """
    weights = random_layers(width, neurons, experts, dtype)
    measured, generator = len(weights[0].down_EHD), torch.Generator().manual_seed(0)

    def seconds(name: str, x_ND: torch.Tensor, tokens_E: torch.Tensor, probs_N: torch.Tensor) -> float:
        start = time.perf_counter()
        for layer in weights:
            BACKENDS[name].compute(layer, x_ND, tokens_E, probs_N, Request(TopK(k), activation))
        return time.perf_counter() - start

    fastest = 0
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        x_ND, probs_N, tokens_E = (
            torch.randn(rows, width, generator=generator).to(dtype),
            torch.ones(rows),
            torch.zeros(measured, dtype=torch.long),
        )
        for row in range(rows):
            tokens_E[row % measured] += 1
        few = dense = math.inf
        for _ in range(3):
            few = min(few, seconds("decode", x_ND, tokens_E, probs_N))
            dense = min(dense, seconds(backend, x_ND, tokens_E, probs_N))
        if few > dense:
            break
        fastest = rows_alike(rows, measured, experts)
    return fastest


_BEYOND_CACHES = 2**27  # bytes
