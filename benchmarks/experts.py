"""Benchmarks time and memory of experts, forward and backward, at several activation ratios relative to ratio 1.

    python -m benchmarks.experts
    python -m benchmarks.experts balance=true              # with the neuron balance loss below ratio 1
    python -m benchmarks.experts width=1024 neurons=512 experts=8 threads=1

fp32. The baseline is ratio 1 with the backend that is fastest on this machine (`mone_model.expert_backends`). Memory is that
which autograd saves for the backward pass, without inputs and weights.
"""

import functools
import statistics
from dataclasses import dataclass, field

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, Run, ratio, time_interleaved
from mone_common.console import command, to_dataclass
from mone_model import megatron

megatron.prepare()  # also in the processes of the contenders, which import this module
# ruff: noqa: E402

from mone_model.config import EXPERT_BACKENDS
from mone_model.expert_backends import BACKENDS, Request
from mone_model.neuron_balance import Balance
from mone_model.neuron_selection import TopK
from train.runtime import keep_freed_memory


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    width: int = 512
    """Model width D."""
    neurons: int = 512
    """Neurons H of an expert."""
    experts: int = 16
    """Number of experts."""
    rows: int = 4096
    """Tokens of all experts together; each expert gets 0.5 to 1.5 times the mean."""
    ratios: list[float] = field(default_factory=lambda: [1.0, 0.5, 0.25, 0.125])
    """Shares of neurons kept."""
    balance: bool = False
    """Whether experts below ratio 1 also compute the sizes of neurons for the balance loss, and their gradient."""
    threads: int = 0
    """Threads; 0: one per core."""
    rounds: int = 7
    """Turns of each contender."""


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_experts", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def inputs_of(options: BenchmarkConfig) -> tuple[Inputs, torch.Tensor]:
    """The tensors x, gate and up, down, routing weights; and the number of rows of each expert."""
    torch.set_num_threads(options.threads or torch.get_num_threads())
    keep_freed_memory()
    torch.manual_seed(0)
    width, neurons, experts = options.width, options.neurons, options.experts
    tokens_E = (torch.linspace(0.5, 1.5, experts) * options.rows / experts).long()
    tokens_E[-1] += options.rows - tokens_E.sum()
    x_ND, probs_N = torch.randn(options.rows, width), torch.rand(options.rows)
    gate_up = torch.randn(experts, 2, neurons, width) * width**-0.5
    down = torch.randn(experts, neurons, width) * neurons**-0.5
    for tensor in (x_ND, gate_up, down, probs_N):
        tensor.requires_grad_()
    return (x_ND, gate_up, down, probs_N), tokens_E


def compute(options: BenchmarkConfig, name: str, share: float, inputs: Inputs, tokens_E: torch.Tensor) -> list[torch.Tensor]:
    """The output of a backend that keeps this share of the neurons of each row, and the sizes of neurons, if asked for."""
    x_ND, gate_up, down, probs_N = inputs
    backend, balance = BACKENDS[name], Balance() if options.balance and share < 1 else None
    request = Request(TopK(round(share * options.neurons)), "silu", balance=balance)
    found = backend.compute(backend.prepare(gate_up, down), x_ND, tokens_E, probs_N, request)
    return [found.out_ND] if found.sizes_EH is None else [found.out_ND, found.sizes_EH]


def build(options: BenchmarkConfig, backend: str, share: float) -> Run:
    """Forward and backward of the experts."""
    inputs, tokens_E = inputs_of(options)
    targets = torch.randn(options.rows, options.width), torch.randn(options.experts, options.neurons)

    def run() -> None:
        found = compute(options, backend, share, inputs, tokens_E)
        torch.autograd.grad(found, inputs, targets[: len(found)])

    return run


def kept_bytes(options: BenchmarkConfig, backend: str, share: float) -> int:
    """Bytes that the forward pass saves for the backward pass, without inputs and weights."""
    inputs, tokens_E = inputs_of(options)
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, *_ = compute(options, backend, share, inputs, tokens_E)
    size = sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in given)
    assert out.requires_grad
    return size


@command("benchmark_experts", path=None)
def main(hydra_config: DictConfig) -> None:
    """Print time and memory of each ratio and backend, relative to ratio 1."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    cases = [(backend, share) for share in options.ratios for backend in EXPERT_BACKENDS]
    contenders = {f"{backend} {share:g}": functools.partial(build, options, backend, share) for backend, share in cases}
    seconds = time_interleaved(contenders, options.rounds)
    best = min((f"{backend} 1" for backend in EXPERT_BACKENDS), key=lambda name: statistics.median(seconds[name]))
    plain = kept_bytes(options, "grouped", 1.0)
    print(f"D {options.width}, H {options.neurons}, {options.experts} experts, {options.rows} rows; ratio 1 at best: {best}")
    print(f"with{'' if options.balance else 'out'} the neuron balance loss below ratio 1")
    print("  ratio  backend       ms   over ratio 1         memory over ratio 1 grouped")
    for backend, share in cases:
        times = seconds[f"{backend} {share:g}"]
        memory = kept_bytes(options, backend, share) / plain
        milliseconds = 1000 * statistics.median(times)
        print(f"  {share:5.3g}  {backend:8} {milliseconds:7.1f}   {ratio(times, seconds[best])}   {memory:.2f}")


if __name__ == "__main__":
    main()
