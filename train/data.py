"""Blended training and validation sequences; sample i of the run is a function of the seed and i alone.

    data = load_data(config, manifests)
    for batch in micro_batches(data.train, start=step * global_batch_size, ...):    # this rank's share
        batch["tokens"]                                                              # [micro_batch_size, seq_length]

Neither the world size nor the number of steps changes the order, so a run continues anywhere with the next sample.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
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
    """By name of the source."""
    unvalidated: list[str]
    """Sources whose validation documents do not hold one sequence."""
    identity: dict[str, Any]
    """What the order depends on, to compare after a resume: see `order_identity`."""
    unigram_entropy: float
    """Mean over the validated sources of the loss that knowing only each token's frequency gives, in nats per token."""


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


def order_identity(config: RunConfig, manifests: list[Manifest]) -> dict[str, Any]:
    """The options on which the order of samples depends, by name, comparable as JSON."""
    return {
        "run.seed": config.run.seed,
        "data.blend": [
            {"name": manifest.name, "weight": source.weight, "content": _content(manifest.of_split("train"))}
            for source, manifest in zip(config.data.blend, manifests, strict=True)
        ],
    }


def _content(shards: list[Shard]) -> str:
    return hashlib.sha256("".join(shard.bin_sha256 for shard in shards).encode()).hexdigest()


def load_data(config: RunConfig, manifests: list[Manifest], *, samples: int) -> RunData:
    """Build the order of the run's samples, rank 0 first; a collective on every rank.

    samples: that the run will have read at its end, those before a resume included.
    """
    with _rebuilt_unless_complete(Path(config.data.index_cache)):
        return _load_data(config, manifests, samples)


@contextlib.contextmanager
def _rebuilt_unless_complete(cache: Path) -> Iterator[None]:
    """Have Megatron-Core build anew a cache that it was killed in: to it, a file that exists is whole."""
    complete = cache / "complete"
    if dist.get_rank() == 0:
        if not complete.exists():
            for path in cache.glob("*-*Dataset-*"):
                path.unlink()
        complete.unlink(missing_ok=True)
        cache.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        complete.touch()


def _load_data(config: RunConfig, manifests: list[Manifest], samples: int) -> RunData:
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
    validated = [manifest for manifest in manifests if _usable_shards(manifest, "validation", config.model.seq_length)]
    return RunData(
        train=Blend(sources, source_of, index_in),
        validation={manifest.name: _load_source(config, manifest, "validation", samples=1) for manifest in validated},
        identity=order_identity(config, manifests),
        unvalidated=[manifest.name for manifest in manifests if manifest not in validated],
        unigram_entropy=sum(manifest.unigram_entropy for manifest in validated) / max(1, len(validated)),
    )


def _load_source(config: RunConfig, manifest: Manifest, split: Split, *, samples: int) -> SourceEpochs:
    """As many epochs of a source as hold `samples`."""
    length = config.model.seq_length
    shards = _usable_shards(manifest, split, length)
    prefixes = [str(manifest.folder / shard.name) for shard in shards]
    tokenizer = _Tokenizer(manifest.vocab_size, manifest.eod_id, {"content": _content(shards)})
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
    multiple_of: int = 1,
) -> Iterator[Batch]:
    """This rank's micro-batches of samples [start, stop): each global micro-batch is data_size consecutive pieces.

    multiple_of: as many micro-batches more as make their number a multiple of this, for interleaved pipelines.
    What is beyond `stop` is filled with masked-out copies of sample `start`, so that every rank takes part.
    """
    width = micro_batch_size * data_size * multiple_of
    rows = range(data_rank * micro_batch_size, (data_rank + 1) * micro_batch_size)
    end = start + -(-(stop - start) // width) * width
    batches = [[first + row for row in rows] for first in range(start, end, micro_batch_size * data_size)]
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
