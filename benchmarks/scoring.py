"""Scoring text, against transformers' own forward passes over the same windows.

    python -m benchmarks.scoring                                   # SmolLM2-135M's shape with 4 layers, random weights
    python -m benchmarks.scoring model=models/olmoe window=2048 documents=8

Each round scores the documents with `mone_eval.text.score_documents`, runs the model on the same batches of windows without
any loss (`forward`), and with the loss of transformers (`loss`), in turn, each in a process of its own with one thread. CPU
time is measured, which other load on the machine changes little. With a stride below the window, the forward passes compute
logits that nobody scores; the default, a stride of a window, compares without this advantage.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING, ratio, time_interleaved
from mone_common.console import command, to_dataclass
from mone_eval.documents import Document
from mone_eval.text import score_documents
from mone_eval.windows import IGNORED, collate, cut, group

SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    model: str | None = None
    """Folder of a model; null: random weights."""
    layers: int = 4
    """Layers of the random model."""
    dtype: str = "float32"
    """Type of the random weights."""
    documents: int = 4
    """Documents, of 1 to 3 windows."""
    window: int = 128
    """Tokens of a window."""
    stride: int | None = None
    """Distance between windows; null: the window."""
    batch_size: int = 4
    """Full windows of a batch."""
    rounds: int = 5
    """Turns of each contender."""


ConfigStore.instance().store(
    name="benchmark_scoring", node={"defaults": ["benchmark_scoring_schema", "_self_", *LOGGING], "hydra": HYDRA}
)
ConfigStore.instance().store(name="benchmark_scoring_schema", node=BenchmarkConfig)


def build(contender: str, options: BenchmarkConfig) -> Callable[[], Any]:
    """The function to time; all contenders have the same model and windows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.model is None:
        config = LlamaConfig(**SMOLLM2, num_hidden_layers=options.layers, max_position_embeddings=options.window)
        model: Any = LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()
    else:
        from mone_model.hf import load

        model, _ = load(Path(options.model))
    lengths = torch.linspace(options.window, 3 * options.window, options.documents).int().tolist()
    documents = [
        Document(str(number), torch.randint(0, model.config.vocab_size, (length,)), 1, "")
        for number, length in enumerate(lengths)
    ]
    stride = options.stride or options.window
    if contender == "ours":
        return functools.partial(
            score_documents,
            model,
            documents,
            window=options.window,
            stride=stride,
            begin=0,
            batch_size=options.batch_size,
        )
    windows = cut(documents, window=options.window, stride=stride, begin=0)
    batches = [collate(batch, documents, begin=0) for batch in group(windows, tokens=options.batch_size * options.window)]

    @torch.no_grad()
    def forward() -> None:
        for inputs_BT, targets_BT in batches:
            if contender == "forward":
                model(input_ids=inputs_BT, use_cache=False)
            else:
                shifted_BT = torch.cat([torch.full_like(targets_BT[:, :1], IGNORED), targets_BT[:, :-1]], dim=1)
                model(input_ids=inputs_BT, labels=shifted_BT, use_cache=False)

    return forward


@command("benchmark_scoring", path=None)
def main(config: DictConfig) -> None:
    """Print the time of scoring as a ratio to each contender's."""
    options = to_dataclass(config, BenchmarkConfig)
    names = ("ours", "forward", "loss")
    contenders = {name: functools.partial(build, name, options) for name in names}
    seconds = time_interleaved(contenders, rounds=options.rounds, clock=time.process_time)
    for name in names[1:]:
        print(f"scoring / {name}: {ratio(seconds['ours'], seconds[name])}")


if __name__ == "__main__":
    main()
