"""Export and import of a model, against copying its files.

    python -m benchmarks.hugging_face                          # a random model of 2.8B parameters in bf16: 5.6 GB
    python -m benchmarks.hugging_face layers=4 rounds=1 folder=/dev/shm

Each round copies the checkpoint with `cp`, exports it with `mone-export`, and reads every weight of the exported folder as a
run with `init.source` on one process does, in turn; what is written is flushed to disk. Each contender is a process of its
own, whose start and imports are timed too. Memory includes the pages of files that are mapped, which the system can drop. A
checkpoint of training also holds the optimizer's state, which an export verifies but does not read; this one holds weights.
"""

import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
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

    layers: int = 26
    """Layers of the model; a layer has 105 million parameters."""
    rounds: int = 3
    """Turns of each contender."""
    folder: str | None = None
    """Folder for the files, 17 GB; null: the system's folder for temporary files."""


ConfigStore.instance().store(
    name="benchmark_hugging_face", node={"defaults": ["benchmark_hugging_face_schema", "_self_", *LOGGING], "hydra": HYDRA}
)
ConfigStore.instance().store(name="benchmark_hugging_face_schema", node=BenchmarkConfig)


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


def read_all(folder: str) -> None:
    """Read every weight of a Hugging Face folder by the names of our checkpoints, one matrix at a time."""
    from mone_model.hf.imported_model import find_model
    from mone_model.hf.sources import open_weights
    from mone_model.hf.weight_map import NAMES, weight_map
    from mone_model.weight_sources import Wanted

    found = find_model(Path(folder))
    source = open_weights(found, found.model, checkpoint=None)
    for weight in weight_map(found.model, NAMES["mone"]):
        part = source.read(Wanted(weight.key, weight.place, weight.shape, tuple(slice(0, size) for size in weight.shape)))
        assert part is not None
        part.clone()  # what is mapped is read when it is used


def timed(words: list[str], seconds: list[float], output: Path | None = None) -> int:
    """Run a program, add the time until its output is on disk, and return its largest resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{words[:4]} failed"
    if output is not None:
        subprocess.run(["sync", "--file-system", str(output)], check=True)
    seconds.append(time.perf_counter() - start)
    return usage.ru_maxrss * 1024


@command("benchmark_hugging_face", path=None)
def main(hydra_config: DictConfig) -> None:
    """Print the speed and the memory of each contender, and its speed over that of the copy."""
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
        copy, exported = Path(folder) / "copy", Path(folder) / "exported"
        program = "import sys; from benchmarks.hugging_face import read_all; read_all(sys.argv[1])"
        contenders = {
            "copy": (["cp", "-r", str(run), str(copy)], copy),
            "export": ([sys.executable, "-m", "mone_model.hf.export", f"run={run}", f"output={exported}"], exported),
            "import": ([sys.executable, "-c", program, str(exported)], None),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        memory = dict.fromkeys(contenders, 0)
        for _ in range(options.rounds):
            for name, (words, output) in contenders.items():
                memory[name] = max(memory[name], timed(words, seconds[name], output))
            shutil.rmtree(copy)
            shutil.rmtree(exported)
    print(f"{count_parameters(model).total / 1e9:.2f}B parameters, {size / 1e9:.2f} GB, {options.rounds} rounds")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"  {name:7} {median:6.1f} s {size / 1e9 / median:6.2f} GB/s   copy / it: {ratio(seconds['copy'], times)}   "
            f"{memory[name] / 1e9:5.2f} GB of memory"
        )


if __name__ == "__main__":
    main()
