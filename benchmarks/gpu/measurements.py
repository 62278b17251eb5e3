"""Time and memory of `select_and_gate` and of whole experts, against the same in torch, eager and compiled.

for record in measure("experts", SHAPES[0], deadline):
    print(record["contender"], record["ratio"], record["forward_ms"], record["backward_ms"])

Contenders: "ours" (the Triton kernels), "torch" (its top-K and elementwise operations) and "torch compiled". At ratio 1
nothing is selected. Shapes: N rows (a token in one of its experts), D width, E experts, H neurons, K kept.
"""

import functools
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu.isolation import Record
from benchmarks.gpu.operator_checks import use_interpreted_kernels
from mone_model.expert_backends import BACKENDS, Request, expert_gemm
from mone_model.neuron_selection import TopK, select_and_gate, select_neurons

RATIOS = (1.0, 0.5, 0.25, 0.125)
ROUNDS, WARM_UP = 15, 3


@dataclass(frozen=True)
class Layer:
    """A layer of routed experts and the tokens of a micro-batch."""

    width: int
    neurons: int
    experts: int
    topk: int
    tokens: int

    @property
    def rows(self) -> int:
        """N."""
        return self.tokens * self.topk

    def __str__(self) -> str:
        return f"D={self.width} H={self.neurons} E={self.experts} top-{self.topk}, {self.tokens} tokens"


# Experts of the sizes of DeepSeek-MoE 16B, of Mixtral 8x7B, and of OLMoE.
LAYERS = (
    Layer(width=2048, neurons=1408, experts=64, topk=6, tokens=16384),
    Layer(width=4096, neurons=14336, experts=8, topk=2, tokens=8192),
    Layer(width=2048, neurons=1024, experts=64, topk=6, tokens=16384),
)
TINY = Layer(width=16, neurons=32, experts=2, topk=1, tokens=3)


@dataclass
class Contender:
    """What takes turns."""

    name: str
    ratio: float
    inputs: list[torch.Tensor]
    forward: Callable[[], torch.Tensor]
    gradient: torch.Tensor

    def run(self) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.forward(), self.inputs, self.gradient)


def torch_select_and_gate(gate_NH: torch.Tensor, up_NH: torch.Tensor, probs_N: torch.Tensor, k: int) -> torch.Tensor:
    """`select_and_gate` by torch's own operations, as one would write it."""
    active_NH = F.silu(gate_NH)
    hidden_NH = active_NH * up_NH * probs_N[:, None].to(gate_NH.dtype)
    return hidden_NH if k == gate_NH.size(1) else hidden_NH * select_neurons(active_NH, k).mask_NH


def torch_experts(
    x_ND: torch.Tensor,
    gate_up_E2HD: torch.Tensor,
    down_EHD: torch.Tensor,
    probs_N: torch.Tensor,
    tokens_E: torch.Tensor,
    k: int,
) -> torch.Tensor:
    """Experts by torch's grouped GEMM and `torch_select_and_gate`."""
    gate_NH, up_NH = expert_gemm(x_ND, gate_up_E2HD.flatten(1, 2).transpose(1, 2), tokens_E).chunk(2, dim=-1)
    return expert_gemm(torch_select_and_gate(gate_NH, up_NH, probs_N, k), down_EHD, tokens_E)


def our_select_and_gate(gate_NH: torch.Tensor, up_NH: torch.Tensor, probs_N: torch.Tensor, k: int) -> torch.Tensor:
    """The operator under test."""
    return select_and_gate(gate_NH, up_NH, probs_N, k).hidden_NH


def our_experts(
    x_ND: torch.Tensor,
    gate_up_E2HD: torch.Tensor,
    down_EHD: torch.Tensor,
    probs_N: torch.Tensor,
    tokens_E: torch.Tensor,
    k: int,
) -> torch.Tensor:
    """The backend `grouped`."""
    backend = BACKENDS["grouped"]
    weights = backend.prepare(gate_up_E2HD, down_EHD)
    return backend.compute(weights, x_ND, tokens_E, probs_N, Request(TopK(k), "silu")).out_ND


def contenders(what: str, layer: Layer, device: str, compiler: str) -> list[Contender]:
    """What is to be measured, the compiled ones last; what: "select_and_gate" or "experts"."""
    generator = torch.Generator(device).manual_seed(0)
    rows, width, neurons, experts = layer.rows, layer.width, layer.neurons, layer.experts

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        tensor = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return tensor.mul_(scale).requires_grad_()

    probs_N = torch.rand(rows, generator=generator, device=device).requires_grad_()
    if what == "select_and_gate":
        # Halves of one tensor, as the grouped GEMM gives them.
        gate_NH, up_NH = (half.detach().requires_grad_() for half in random(rows, 2 * neurons).chunk(2, dim=1))
        inputs = [gate_NH, up_NH, probs_N]
        gradient = random(rows, neurons).detach()
        fixed: list[torch.Tensor] = []
        ours: Callable[..., torch.Tensor] = our_select_and_gate
        theirs: Callable[..., torch.Tensor] = torch_select_and_gate
    else:
        # From half to one and a half times the mean.
        tokens_E = (torch.linspace(0.5, 1.5, experts) * rows / experts).long()
        tokens_E[-1] += rows - tokens_E.sum()
        gate_up_E2HD = random(experts, 2, neurons, width, scale=width**-0.5)
        down_EHD = random(experts, neurons, width, scale=neurons**-0.5)
        inputs, fixed = [random(rows, width), gate_up_E2HD, down_EHD, probs_N], [tokens_E.to(device)]
        gradient = random(rows, width).detach()
        ours, theirs = our_experts, torch_experts

    compiled = torch.compile(theirs, backend=compiler, dynamic=False)
    functions = [("ours", ours), ("torch", theirs), ("torch compiled", compiled)]
    if what == "experts":
        functions.append(("ours compiled", torch.compile(ours, backend=compiler, dynamic=False)))
    return [
        Contender(name, ratio, inputs, functools.partial(function, *inputs, *fixed, round(ratio * neurons)), gradient)
        for name, function in functions
        for ratio in RATIOS
        if not (what == "select_and_gate" and name == "ours" and ratio == 1)  # it is not called then
    ]


def measure(what: str, layer: Layer, deadline: float, device: str = "cuda", compiler: str = "inductor") -> Iterator[Record]:
    """A record for each contender: medians of interleaved turns, and memory.

    deadline: in seconds of `time.time()`; contenders that did not run by then are left out, with a record.
    """
    use_interpreted_kernels()
    ready: list[tuple[Contender, Record]] = []
    for contender in contenders(what, layer, device, compiler):
        record: Record = {"what": what, "shape": str(layer), "contender": contender.name, "ratio": contender.ratio}
        if time.time() > deadline:
            yield record | {"kind": "skipped", "name": _title(record), "reason": "no time left"}
            continue
        start = time.time()
        try:
            for _ in range(WARM_UP if device == "cuda" else 1):
                contender.run()
            record |= _memory(contender) if device == "cuda" else {"peak_bytes": None, "kept_bytes": None}
        except Exception:  # out of memory, or what a compiler says
            yield record | {"name": _title(record), "passed": False, "error": traceback.format_exc(limit=-4)}
            continue
        record["first_seconds"] = round(time.time() - start, 2)
        ready.append((contender, record))
    times: list[list[tuple[float, float]]] = [[] for _ in ready]
    for _ in range(ROUNDS if device == "cuda" else 0):
        for (contender, _), turns in zip(ready, times, strict=True):
            turns.append(_milliseconds(contender))
    for (_, record), turns in zip(ready, times, strict=True):
        yield record | {
            "name": _title(record),
            "passed": True,
            "forward_ms": _median(turns, 0),
            "backward_ms": _median(turns, 1),
        }


def _title(record: Record) -> str:
    return f"{record['what']} {record['shape']} {record['contender']} ratio {record['ratio']:g}"


def _median(turns: list[tuple[float, float]], part: int) -> dict[str, float] | None:
    """Median and extremes of the first or second part; None without turns."""
    values = [turn[part] for turn in turns]
    if not values:
        return None
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def _milliseconds(contender: Contender) -> tuple[float, float]:
    """Of a forward and of a backward pass on the GPU."""
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    # The GPU is busy with this while the passes are enqueued: else it would wait for Python between kernels.
    contender.run()
    start.record()
    out = contender.forward()
    middle.record()
    torch.autograd.grad(out, contender.inputs, contender.gradient)
    end.record()
    end.synchronize()
    return start.elapsed_time(middle), middle.elapsed_time(end)


def _memory(contender: Contender) -> Record:
    """Bytes that the passes need at most, inputs aside, and those that the forward pass keeps, its result included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = contender.forward()
    kept = torch.cuda.memory_allocated() - before
    torch.autograd.grad(out, contender.inputs, contender.gradient)
    return {"peak_bytes": torch.cuda.max_memory_allocated() - before, "kept_bytes": kept}


def measure_ceilings(size: int = 8192) -> Iterator[Record]:
    """What this GPU reaches at best: a copy and a matrix product in bf16."""
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    for name, run, amount, unit in (
        ("copy", lambda: target.copy_(source), 2 * source.nbytes / 1e9, "GB/s"),
        ("matrix product", lambda: a @ b, 2 * size**3 / 1e12, "TFLOP/s"),
    ):
        milliseconds = []
        for _ in range(WARM_UP + ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
        rate = 1000 * amount / statistics.median(milliseconds[WARM_UP:])
        yield {"what": "ceiling", "name": name, "passed": True, "rate": round(rate, 1), "unit": unit}
