"""Blended training and validation sequences; sample i of the run is a function of the seed and i alone.

    order = plan_order(config, manifests, None, 0)                                  # train.sample_order
    data = load_data(config, manifests, order, samples=steps * global_batch_size)
    for batch in micro_batches(data.train, start=step * global_batch_size, ...):    # this rank's share
        batch["tokens"]                                                              # [micro_batch_size, seq_length]

Neither the world size nor the number of steps changes the order, so a run continues anywhere with the next sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from data_prep.shards import Manifest
from mone_common.processes import kill_daemons_at_exit, outlive_signals
from train.config import RunConfig
from train.sample_order import Reading, interleave, usable_shards, weights_of
from train.sources import Batch, ReadError, Source, reserve_descriptors

VALIDATION_SEED = 1234
"""Of the order of validation sequences, whatever run reads them: losses of two runs are of the same text."""


class Blend(Dataset[Batch]):
    """Sources interleaved by weight, by Megatron-Core's greedy rule: sample i does not depend on how many follow."""

    def __init__(self, sources: list[Source], source_of: np.ndarray, index_in: np.ndarray) -> None:
        self.sources, self.source_of, self.index_in = sources, source_of, index_in

    def __getitem__(self, index: int) -> Batch:
        return self.sources[int(self.source_of[index])][int(self.index_in[index])]

    def __len__(self) -> int:
        return len(self.source_of)


@dataclass(frozen=True)
class RunData:
    """What a run reads."""

    train: Blend
    """From sample `order["start"]` of the run on."""
    validation: dict[str, Source]
    """By name of the source."""
    unvalidated: list[str]
    """Sources whose validation documents do not hold one sequence."""
    order: dict[str, Any]
    """From `plan_order`."""
    files: dict[Path, tuple[int, int]]
    """Size and time of change (ns) of every shard when the run began."""
    unigram_entropy: float
    """Mean over the validated sources of the loss that knowing only each token's frequency gives, in nats per token."""
    reading: list[Reading]
    """By source."""

    def changed_file(self) -> Path | None:
        """A shard that is not what it was when the run began, or None. Reads only their directories' entries."""
        return next((path for path, before in self.files.items() if _look_at(path) != before), None)


def _look_at(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)


def load_data(config: RunConfig, manifests: list[Manifest], order: dict[str, Any], *, samples: int) -> RunData:
    """Make ready the order of the run's samples, rank 0 first; a collective on every rank.

    order: from `plan_order`. samples: that the run will have read at its end, those before a resume included.

    Raises ReadError for a damaged shard, DataError for more shards than files can be open.
    """
    source_of, index_in = interleave(weights_of(order["sources"]), samples - order["start"])
    read = np.array([source["read"] for source in order["sources"]], dtype=np.int64)
    length, cache = config.model.seq_length, Path(config.data.index_cache)
    sources = [
        Source(manifest, "train", sequence_length=length, seed=config.data_seed, cache=cache) for manifest in manifests
    ]
    validated = [manifest for manifest in manifests if usable_shards(manifest, "validation", length)]
    validation = {
        manifest.name: Source(manifest, "validation", sequence_length=length, seed=VALIDATION_SEED, cache=cache)
        for manifest in validated
    }
    reserve_descriptors([*sources, *validation.values()])
    # Where the file system has no locks, all ranks would make the same files at the same time.
    for turn in (True, False):
        if turn == (dist.get_rank() == 0):
            for source, first in [
                *zip(sources, read.tolist(), strict=True),
                *((source, 0) for source in validation.values()),
            ]:
                source.open_epoch(first)
        dist.barrier()
    shards = [manifest.folder / name for manifest in manifests for shard in manifest.shards for name, *_ in shard.files()]
    counts = np.bincount(source_of, minlength=len(read)) + read
    return RunData(
        train=Blend(sources, source_of, index_in + read[source_of]),
        validation=validation,
        order=order,
        unvalidated=[manifest.name for manifest in manifests if manifest not in validated],
        files={path: _look_at(path) for path in shards},
        unigram_entropy=sum(manifest.unigram_entropy for manifest in validated) / max(1, len(validated)),
        reading=[
            Reading(source.manifest.name, share, source.manifest.tokens("train"), int(count) * length, count / source.size)
            for source, share, count in zip(sources, weights_of(order["sources"]).tolist(), counts.tolist(), strict=True)
        ],
    )


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
    if num_workers:
        kill_daemons_at_exit()  # the workers that an exception, whose traceback holds the loader, leaves behind
    width = micro_batch_size * data_size * multiple_of
    rows = range(data_rank * micro_batch_size, (data_rank + 1) * micro_batch_size)
    end = start + -(-(stop - start) // width) * width
    # Not a list: a long run has hundreds of millions of samples.
    batches = ([first + row for row in rows] for first in range(start, end, micro_batch_size * data_size))
    loader: DataLoader[Batch] = DataLoader(
        _Padded(dataset, start, stop),
        batch_sampler=batches,
        num_workers=num_workers,
        worker_init_fn=outlive_signals,
        # Of its own: a loader draws a seed when it starts, and a resumed run starts one more.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except ReadError as error:
        # A worker's error comes with its traceback in the message, behind which the message stands.
        raise ReadError(str(error).strip().rpartition("ReadError: ")[2]) from None


class _Padded(Dataset[Batch]):
    """Samples from `stop` on are sample `start` with an empty loss mask."""

    def __init__(self, dataset: Dataset[Batch], start: int, stop: int) -> None:
        self.dataset, self.start, self.stop = dataset, start, stop

    def __getitem__(self, index: int) -> Batch:
        if index < self.stop:
            return self.dataset[index]
        sample = self.dataset[self.start]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}
