"""Blended training and validation sequences; sample i of the run is a function of the seed and i alone.

    data = load_data(config, manifests)
    for batch in micro_batches(data.train, start=step * global_batch_size, ...):    # this rank's share
        batch["tokens"]                                                              # [micro_batch_size, seq_length]

Neither the world size nor the number of steps changes the order, so a run continues anywhere with the next sample.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset

from data_prep.shards import Manifest, Shard, Split, load_manifest
from train.config import RunConfig

Batch = dict[str, torch.Tensor]


class SourceEpochs(Dataset[Batch]):
    """The sequences of one source, epoch after epoch, each in an order of its own."""

    def __init__(self, epochs: list[Any]) -> None:
        self.epochs, self.size = epochs, len(epochs[0])

    def __getitem__(self, index: int) -> Batch:
        epoch, offset = divmod(index, self.size)
        return self.epochs[epoch][offset]

    def __len__(self) -> int:
        return self.size * len(self.epochs)


class Blend(Dataset[Batch]):
    """Sources interleaved by weight, by Megatron-Core's greedy rule: sample i does not depend on how many follow."""

    def __init__(self, sources: list[SourceEpochs], source_of: np.ndarray, index_in: np.ndarray) -> None:
        self.sources, self.source_of, self.index_in = sources, source_of, index_in

    def __getitem__(self, index: int) -> Batch:
        return self.sources[int(self.source_of[index])][int(self.index_in[index])]

    def __len__(self) -> int:
        return len(self.source_of)


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    train: Blend
    validation: dict[str, SourceEpochs]
    """By name of the source, without those too small to hold one sequence."""
    unigram_entropy: float
    """Mean over the sources of the loss that knowing only the frequency of each token would give, in nats per token."""


@dataclass(frozen=True)
class _Tokenizer:
    """What GPTDataset asks of a tokenizer; its identifiers are part of the key of the cached order."""

    vocab_size: int
    eod: int
    unique_identifiers: dict[str, str]


def load_manifests(config: RunConfig) -> list[Manifest]:
    """The manifests of all sources, their shards' sizes checked; ValueError for damage or sources that do not fit."""
    blend, length = config.data.blend, config.model.seq_length
    manifests = [load_manifest(source.path) for source in blend]
    first = manifests[0]
    for source, manifest in zip(blend, manifests, strict=True):
        manifest.check_sizes()
        if not _usable_shards(manifest, "train", length):
            raise ValueError(f"data.blend: no shard of {source.path} holds a sequence of model.seq_length={length} tokens")
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(
                f"data.blend: {source.path} was tokenized with another tokenizer than {blend[0].path}; "
                "tokenize all sources with one"
            )
    names = [manifest.name for manifest in manifests]
    if len(set(names)) < len(names):
        raise ValueError(f"data.blend: two sources have the same name in {names}; give corpus.name when tokenizing")
    return manifests


def load_data(config: RunConfig, manifests: list[Manifest]) -> RunData:
    """Build the sample order of the run, rank 0 first; a collective on every rank."""
    samples = config.training.steps * config.training.global_batch_size
    weights = np.array(
        [
            source.weight if source.weight is not None else manifest.tokens("train")
            for source, manifest in zip(config.data.blend, manifests, strict=True)
        ],
        dtype=np.float64,
    )
    # Megatron-Core's helper wants int16 places for the source of each sample.
    source_of, index_in = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(source_of, index_in, weights / weights.sum(), len(weights), samples, False)
    counts = np.bincount(source_of, minlength=len(weights))
    sources = [
        _load_source(config, manifest, "train", samples=int(count))
        for manifest, count in zip(manifests, counts, strict=True)
    ]
    validation = {manifest.name: _load_source(config, manifest, "validation", samples=1) for manifest in manifests}
    return RunData(
        Blend([source for source in sources if source is not None], source_of, index_in),
        {name: source for name, source in validation.items() if source is not None},
        sum(manifest.unigram_entropy for manifest in manifests) / len(manifests),
    )


def _load_source(config: RunConfig, manifest: Manifest, split: Split, *, samples: int) -> SourceEpochs | None:
    """As many epochs of a source as hold `samples`; None if it is too small for a single sequence."""
    length = config.model.seq_length
    shards = _usable_shards(manifest, split, length)
    prefixes = [str(manifest.folder / shard.name) for shard in shards]
    if not prefixes:
        return None
    content = hashlib.sha256("".join(shard.bin_sha256 for shard in shards).encode()).hexdigest()
    tokenizer = _Tokenizer(manifest.vocab_size, manifest.eod_id, {"content": content})
    epochs: list[Any] = []
    while not epochs or len(epochs) * len(epochs[0]) < samples:
        blend = (prefixes, None)
        built = BlendedMegatronDatasetBuilder(
            GPTDataset,
            [None, None, None],
            lambda: True,
            GPTDatasetConfig(
                random_seed=config.run.seed + len(epochs),
                sequence_length=length,
                blend_per_split=[blend if split == "train" else None, blend if split == "validation" else None, None],
                path_to_cache=config.data.index_cache,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
                tokenizer=tokenizer,
            ),
        ).build()
        epochs.append(built[0] if split == "train" else built[1])
    return SourceEpochs(epochs)


def _usable_shards(manifest: Manifest, split: Split, length: int) -> list[Shard]:
    # Megatron-Core packs sequences within a shard, so one of a few documents may not hold any.
    return [shard for shard in manifest.of_split(split) if shard.tokens > length]


def micro_batches(
    dataset: Dataset[Batch],
    *,
    start: int,
    stop: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """This rank's micro-batches of samples [start, stop): each global micro-batch is data_size consecutive pieces.

    A last, partial global micro-batch is filled with masked-out copies of sample `start`, so that every rank takes part.
    """
    width = micro_batch_size * data_size
    rows = range(data_rank * micro_batch_size, (data_rank + 1) * micro_batch_size)
    batches = [[first + row for row in rows] for first in range(start, stop, width)]
    loader: DataLoader[Batch] = DataLoader(
        _Padded(dataset, start, stop),
        batch_sampler=batches,
        num_workers=num_workers,
        # Of its own: a loader draws a seed when it starts, and a resumed run starts one more.
        generator=torch.Generator(),
    )
    yield from loader


class _Padded(Dataset[Batch]):
    """Samples from `stop` on are sample `start` with an empty loss mask."""

    def __init__(self, dataset: Dataset[Batch], start: int, stop: int) -> None:
        self.dataset, self.start, self.stop = dataset, start, stop

    def __getitem__(self, index: int) -> Batch:
        if index < self.stop:
            return self.dataset[index]
        sample = self.dataset[self.start]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}
