"""The cost of a sparsification study beside its bound: FLOPs at the speed of a product, and one read of the weights.

    python -m benchmarks.sparsity                                   # a random Mixtral of 3 GB, written to a temporary folder
    python -m benchmarks.sparsity model=models/smollm2 text='wiki/*.jsonl' max_tokens=8192

The study scores text at ratios 1, 1/2 and 1/4, exactly and by threshold: five streams. The bound counts the products of all
layers and of the head, and attention, at the speed of a product of matrices of the model's width, measured just before;
and reading the weights at the speed at which files are read from the page cache. Memory is the largest resident memory of
the process, less that before the study. The study and the bound run in one process with the same number of threads.
"""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING
from mone_common.console import command, to_dataclass
from mone_eval.models import find_device
from mone_eval.sparsify import SparsifyConfig, open_layerwise, prepare, run
from mone_eval.sparsity_plan import describe_plan, plan_of


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    model: str | None = None
    """Folder of a model of transformers; null: a random Mixtral of 3 GB."""
    text: str = "docs"
    """Text to score."""
    max_tokens: int = 8192
    """Tokens to score."""
    threads: int = 2
    """Threads of torch."""


ConfigStore.instance().store(
    name="benchmark_sparsity", node={"defaults": ["benchmark_sparsity_schema", "_self_", *LOGGING], "hydra": HYDRA}
)
ConfigStore.instance().store(name="benchmark_sparsity_schema", node=BenchmarkConfig)


def write_mixtral(folder: Path) -> None:
    """A random Mixtral of 3 GB in fp32 with a byte-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = MixtralConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@command("benchmark_sparsity", path=None)
def main(hydra_config: DictConfig) -> None:
    """Print the plan, and the time and the memory of the study beside their bounds."""
    import multiprocessing

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options = to_dataclass(hydra_config, BenchmarkConfig)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(options.model or temporary)
        if options.model is None:
            # In a process of its own, whose memory would count.
            writer = multiprocessing.get_context("spawn").Process(target=write_mixtral, args=(model,))
            writer.start()
            writer.join()
            assert writer.exitcode == 0, "the model was not written"
        files = sorted(model.glob("*.safetensors"))
        begin = time.perf_counter()
        for path in files:
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass
        reading = time.perf_counter() - begin
        study_options = SparsifyConfig(
            model=str(model), text=options.text, output="unused", ratios=[1, 0.5, 0.25], max_tokens=options.max_tokens
        )
        layerwise, tokenizer = open_layerwise(study_options, find_device("cpu"))
        study = prepare(study_options, layerwise, tokenizer, [])
        plan = plan_of(study)
        before = peak()
        seconds = run(study, Path(temporary) / "state.pt", identity="", every=float("inf"))
        begin = time.perf_counter()
        for index in range(len(study.streams)):
            study.score(index)
        seconds += time.perf_counter() - begin
        again = plan_of(study)
    speed = max(plan.flops_per_second, again.flops_per_second)
    bound = plan.flops / speed + reading
    memory = 2 * plan.layer_bytes + plan.stream_bytes
    print(describe_plan(plan))
    print(f"time: {seconds:.1f} s, bound {bound:.1f} s ({reading:.1f} s of it reading), ratio {seconds / bound:.2f}")
    print(
        f"memory: {(peak() - before) / 1e9:.2f} GB above the start, bound {memory / 1e9:.2f} GB (two layers and the streams)"
    )


if __name__ == "__main__":
    main()
