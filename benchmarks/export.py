"""Exporting a checkpoint, against copying its files.

    python -m benchmarks.export                          # a random model of 2.6B parameters in bf16: 5.2 GB
    python -m benchmarks.export layers=4 rounds=1 folder=/dev/shm

Each round copies the checkpoint with `cp` and exports it with `mone-export`, in turn, each followed by a flush to disk. A
checkpoint of training also holds the optimizer's state, which an export verifies but does not read; this one holds weights.
"""

import contextlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, ratio
from mone_common.checkpoint_folder import publish
from mone_common.console import command, to_dataclass
from mone_model import megatron
from mone_model.accounting import count_parameters
from mone_model.config import ComputeConfig, ModelConfig, ParallelConfig


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    layers: int = 24
    """Layers of the model; a layer has 105 million parameters."""
    rounds: int = 3
    """Times that the checkpoint is copied and exported."""
    folder: str | None = None
    """Folder for the files, 16 GB; null: the system's folder for temporary files."""


ConfigStore.instance().store(
    name="benchmark_export", node={"defaults": ["benchmark_export_schema", "_self_", *LOGGING], "hydra": HYDRA}
)
ConfigStore.instance().store(name="benchmark_export_schema", node=BenchmarkConfig)


def write_checkpoint(folder: Path, model: ModelConfig) -> None:
    """Save a model with random weights in bf16, layer by layer as a run does."""
    megatron.prepare()
    from megatron.core import dist_checkpointing

    from mone_model.megatron import gpt as gpts
    from train.runtime import distributed

    parallel = ParallelConfig()
    with distributed(parallel, seed=1, timeout_minutes=5):
        gpts.fill_weights = lambda *_, **__: None
        gpt = gpts.build_gpt(model, parallel, ComputeConfig(experts="loop", precision="bf16"), seed=1)
        with torch.no_grad():
            for weight in gpt.parameters():
                weight.uniform_(-0.03, 0.03)
        unfinished = folder / "checkpoints/.unfinished-step-1"
        unfinished.mkdir(parents=True)
        dist_checkpointing.save(gpt.sharded_state_dict(), str(unfinished))
        options = {name: getattr(model, name) for name in model.__dataclass_fields__}
        publish(unfinished, step=1, noted={"model": options, "precision": "bf16"})


@contextlib.contextmanager
def timed(seconds: list[float], output: Path) -> Iterator[None]:
    """Add the time of the block, and of flushing the output to disk; then remove it."""
    start = time.perf_counter()
    yield
    subprocess.run(["sync", "--file-system", str(output)], check=True)
    seconds.append(time.perf_counter() - start)
    shutil.rmtree(output)


def export(run: Path, output: Path) -> int:
    """Export in a process of its own; return its largest resident memory in bytes."""
    words = [sys.executable, "-m", "mone_model.hf.export", f"run={run}", f"output={output}"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, "the export failed"
    return usage.ru_maxrss * 1024


@command("benchmark_export", path=None)
def main(hydra_config: DictConfig) -> None:
    """Print the time of the export over that of the copy, and the memory of the export."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    model = ModelConfig(
        num_layers=options.layers,
        hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=4,
        seq_length=1024,
        vocab_size=32000,
        num_experts=64,
        router_topk=8,
        moe_ffn_hidden_size=512,
        activation_ratio=0.5,
    )
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = Path(folder) / "run"
        # In a process of its own, whose memory the exports would inherit until they start another program.
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=(run, model))
        writer.start()
        writer.join()
        assert writer.exitcode == 0, "the checkpoint was not written"
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        copying: list[float] = []
        exporting: list[float] = []
        for _ in range(options.rounds):
            with timed(copying, Path(folder) / "copy"):
                subprocess.run(["cp", "-r", str(run), str(Path(folder) / "copy")], check=True)
            with timed(exporting, Path(folder) / "exported"):
                memory = export(run, Path(folder) / "exported")
    print(f"{count_parameters(model).total / 1e9:.2f}B parameters, {size / 1e9:.2f} GB, {options.rounds} rounds")
    for name, times in (("copy", copying), ("export", exporting)):
        print(f"  {name:8} {statistics.median(times):6.1f} s   {size / 1e9 / statistics.median(times):5.2f} GB/s")
    print(f"  copy / export: {ratio(copying, exporting)}; memory of the export: {memory / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
