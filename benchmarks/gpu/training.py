"""A training step on Megatron-Core: tokens per second and memory, and the first losses against a CPU's.

for record in measure_step("mone_small", 0.25, "bf16", micro_batch_size=8, steps=15):
    print(record["tokens_per_second"], record["peak_bytes"])

It needs the whole project installed. Each function runs in a process of its own and sets its environment before it imports
torch.
"""

import os
import statistics
import time
from collections.abc import Iterator

from benchmarks.gpu.isolation import Record

WARM_UP = 3
VOCABULARIES = {"mone_tiny": 4096, "mone_small": 32000, "mone_925m": 50304}
"""As in README.md."""


def measure_step(model: str, ratio: float, precision: str, micro_batch_size: int, steps: int) -> Iterator[Record]:
    """Median time of a step of a model of configs/model, and the most memory that torch had allocated."""
    os.environ.pop("TRITON_INTERPRET", None)
    import torch

    from benchmarks.step import compose, megatron_step
    from mone_model.megatron.transformer_engine import uses_transformer_engine

    name = f"training step of {model}, ratio {ratio:g}"
    config = compose(
        f"model={model}", f"model.vocab_size={VOCABULARIES[model]}", f"model.activation_ratio={ratio}",
        f"compute.precision={precision}", f"training.micro_batch_size={micro_batch_size}",
    )  # fmt: skip
    seconds = []
    try:
        step = megatron_step(config)
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            step()  # it reads the loss, and so waits for the GPU
            seconds.append(time.perf_counter() - start)
    except torch.cuda.OutOfMemoryError:
        yield {"kind": "skipped", "name": name, "reason": "not enough memory"}
        return
    median = statistics.median(seconds[WARM_UP:])
    tokens = micro_batch_size * config.model.seq_length
    yield {
        "what": "training step", "name": name, "passed": True, "model": model, "ratio": ratio, "precision": precision,
        "tokens": tokens, "step_ms": round(1000 * median, 2), "tokens_per_second": round(tokens / median),
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "transformer_engine": uses_transformer_engine(config.compute),
    }  # fmt: skip


def first_losses(model: str, place: str, steps: int) -> Iterator[Record]:
    """Losses of the first steps in fp32 with Megatron-Core's own layers; weights and data are the same everywhere.

    place: "here", on a GPU if there is one, or "on the CPU".
    """
    os.environ.pop("TRITON_INTERPRET", None)
    if place == "on the CPU":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from benchmarks.step import compose, megatron_step
    from mone_model.weight_sources import RandomWeights

    config = compose(
        f"model={model}", f"model.vocab_size={VOCABULARIES[model]}", "training.micro_batch_size=1",
        "compute.precision=fp32", "compute.transformer_impl=local", "optimizer.warmup_steps=0",
    )  # fmt: skip
    step = megatron_step(config, RandomWeights(config.model, seed=0))
    losses = [step().loss for _ in range(steps)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    yield {"what": "losses", "name": f"losses of {model}, {device}", "passed": True, "losses": losses}


def compare_losses(model: str, ours: list[float], right: list[float]) -> Record:
    """The check of losses against the CPU's: the first may differ by 1e-5 of it, later ones by 1e-3.

    Rounding can send a token to another expert or keep another neuron, and each step adds to it.
    """
    shares = [
        abs(mine - its) / (its * (1e-3 if position else 1e-5))
        for position, (mine, its) in enumerate(zip(ours, right, strict=True))
    ]
    worst = max(range(len(shares)), key=lambda position: shares[position])
    return {
        "kind": "check", "group": "training", "name": f"losses of {model} against the CPU's", "passed": shares[worst] <= 1,
        "worst": float(f"{shares[worst]:.3g}"), "quantity": "loss", "row": f"step {worst + 1}", "losses": [ours, right],
    }  # fmt: skip
