"""Time of experts for 1 to 64 rows, forward only: with and without skipping dropped neurons, and the plain MoE.

for record in measure_few_rows(LAYERS[0], deadline):
    print(record["contender"], record["ratio"], record["rows"], record["microseconds"])

Contenders: "plain MoE" (torch's grouped GEMMs, all neurons), "dense, selecting" (the backend `grouped`, which drops neurons
but reads their weights) and "skipping" (the backend `decode`). Each row is in a random expert. Calls cycle through different
experts, so that their weights are not in the L2 cache. A CUDA graph launches them where torch can capture them: else the
time would be that of Python.

Shapes: N rows, E experts, H neurons, D width.
"""

import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu.isolation import Record
from benchmarks.gpu.measurements import Layer, torch_experts
from benchmarks.gpu.operator_checks import use_interpreted_kernels
from benchmarks.gpu.traffic import bound, count_traffic
from mone_model.expert_backends import BACKENDS, Request, Weights, expert_gemm
from mone_model.neuron_selection import TopK

ROWS = (1, 2, 4, 8, 16, 32, 64)
RATIOS = (1.0, 0.5, 0.25, 0.1)
CALLS, ROUNDS = 16, 11
Call = Callable[[], Any]


def measure_few_rows(layer: Layer, deadline: float, device: str = "cuda") -> Iterator[Record]:
    """A record for each number of rows and contender.

    deadline: in seconds of `time.time()`; numbers of rows that did not start by then are left out, with a record.
    """
    use_interpreted_kernels()
    generator = torch.Generator(device).manual_seed(0)
    shape = (layer.experts, layer.neurons, layer.width)
    weights = Weights(_random(generator, shape[0], 2, *shape[1:]), _random(generator, *shape))
    for rows in ROWS if device == "cuda" else ROWS[:2]:
        if time.time() > deadline:
            yield {"kind": "skipped", "name": f"few rows {layer}, {rows} rows", "reason": "no time left"}
            continue
        yield from _measure_rows(layer, weights, rows, generator, device)


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    values = torch.empty(shape, device=generator.device, dtype=torch.bfloat16)
    return values.normal_(generator=generator).mul_(shape[-1] ** -0.5)


@torch.no_grad()
def _measure_rows(layer: Layer, weights: Weights, rows: int, generator: torch.Generator, device: str) -> Iterator[Record]:
    x_ND, probs_N = _random(generator, rows, layer.width).mul_(layer.width**0.5), torch.ones(rows, device=device)
    experts_CN = torch.randint(layer.experts, (CALLS, rows), generator=generator, device=device)
    tokens_CE = [torch.bincount(experts_N, minlength=layer.experts) for experts_N in experts_CN]
    used = sum(int((tokens_E > 0).sum()) for tokens_E in tokens_CE) / CALLS
    dense = 3 * used * layer.neurons * layer.width * weights.down_EHD.itemsize

    def calls(compute: Callable[..., Any], *last: Any) -> Call:
        def run() -> None:
            for tokens_E in tokens_CE:
                compute(tokens_E, *last)

        return run

    def plain(tokens_E: torch.Tensor, k: int) -> torch.Tensor:
        return torch_experts(x_ND, *weights, probs_N, tokens_E, k)

    def of_backend(tokens_E: torch.Tensor, name: str, k: int) -> torch.Tensor:
        return BACKENDS[name].compute(weights, x_ND, tokens_E, probs_N, Request(TopK(k), "silu")).out_ND

    some = [max(1, round(ratio * layer.neurons)) for ratio in RATIOS]
    contenders: list[tuple[str, float, Call, float]] = [("plain MoE", 1.0, calls(plain, layer.neurons), 1.0)]
    for ratio, k in zip(RATIOS, some, strict=True):
        if ratio < 1:
            contenders.append(("dense, selecting", ratio, calls(of_backend, "grouped", k), 1.0))
        share = _share_read(weights, x_ND, tokens_CE[0], k)
        contenders.append(("skipping", ratio, calls(of_backend, "decode", k), share))
    ready: list[tuple[Record, Call]] = []
    for name, ratio, run, share in contenders:
        record: Record = {
            "what": "few rows", "shape": str(layer), "name": f"few rows {layer}, {rows} rows, {name} {ratio:g}",
            "contender": name, "ratio": ratio, "rows": rows, "share_read": round(share, 4),
            "bound": round(bound(ratio, rows / used), 4), "dense_bytes": round(dense),
        }  # fmt: skip
        try:
            run()
            launch, record["graph"] = _captured(run) if device == "cuda" else (run, False)
        except Exception:  # out of memory, or what a compiler says
            yield record | {"passed": False, "error": traceback.format_exc(limit=-4)}
            continue
        ready.append((record, launch))
    turns: list[list[float]] = [[] for _ in ready]
    for _ in range(ROUNDS if device == "cuda" else 0):
        for (_, launch), its in zip(ready, turns, strict=True):
            its.append(_microseconds(launch))
    for (record, _), its in zip(ready, turns, strict=True):
        times = {"median": round(statistics.median(its), 2), "min": round(min(its), 2)} if its else None
        yield record | {"passed": True, "microseconds": times}


def _share_read(weights: Weights, x_ND: torch.Tensor, tokens_E: torch.Tensor, k: int) -> float:
    """Weights that these rows must read, over those of their experts."""
    from mone_model.kernels.triton import decode

    gate_NH = expert_gemm(x_ND, weights.gate_up_E2HD[:, 0].transpose(1, 2), tokens_E)
    experts_N = torch.arange(len(tokens_E), device=x_ND.device).repeat_interleave(tokens_E).int()
    kept = decode.select_rows(gate_NH, torch.ones(len(x_ND), device=x_ND.device), experts_N, k, "silu")
    traffic = count_traffic(kept, experts_N, neurons=gate_NH.size(1), width=x_ND.size(1), itemsize=x_ND.itemsize)
    return traffic.once / traffic.dense


def _captured(run: Call) -> tuple[Call, bool]:
    """A function that launches the work of `run`, and whether as a CUDA graph: torch cannot capture all grouped GEMMs."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def _microseconds(launch: Call) -> float:
    """Of one call, on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    launch()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end) / CALLS
