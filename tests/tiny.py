"""What tests train: a model of milliseconds a step, and token datasets without text or tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import Manifest, ShardWriter, entropy

TINY_MODEL: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "seq_length": 16,
    "vocab_size": 64,
    "num_experts": 4,
    "moe_ffn_hidden_size": 32,
    "shared_expert_ffn_hidden_size": 32,
}


def make_shards(
    folder: Path,
    *,
    name: str = "synthetic",
    vocab_size: int = 64,
    documents: int = 200,
    seed: int = 0,
    shards_per_split: int = 1,
) -> Path:
    """Write a dataset whose documents count upwards in steps of 1 or 2, so that a model can learn to predict them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    shards, counts = [], np.zeros(vocab_size)
    for split, number in (("train", documents), ("validation", documents // 5)):
        for shard, part in enumerate(np.array_split(np.arange(number), shards_per_split)):
            writer = ShardWriter(folder, f"{split}-{shard:05}", split, "uint16")  # type: ignore[arg-type]
            for _ in part:
                length, start, step = random.integers(20, 80), random.integers(1, vocab_size), random.integers(1, 3)
                tokens = 1 + (start + step * np.arange(length)) % (vocab_size - 1)
                tokens[-1] = 0
                writer.add(tokens.astype(np.uint16))
                if split == "train":
                    counts += np.bincount(tokens, minlength=vocab_size)
            shards.append(writer.finish("synthetic"))
    Manifest(
        folder=folder,
        name=name,
        vocab_size=vocab_size,
        eod_id=0,
        dtype="uint16",
        tokenizer_sha256="none",
        round_trip=False,
        unigram_entropy=entropy(counts),
        records={},
        settings={},
        shards=tuple(shards),
    ).save()
    return folder


def always(loss: float, grad_norm: float) -> bool:
    """Accept every step."""
    return True
