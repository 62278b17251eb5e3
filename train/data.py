"""Blended training and validation sequences. Sample i of a run depends only on the seed and i.

    order = plan_order(config, manifests, None, 0)                                  # train.sample_order
    data = load_data(config, manifests, order, samples=steps * global_batch_size)
    for batch in micro_batches(data.train, start=step * global_batch_size, ...):    # this rank's share
        batch["tokens"]                                                              # [micro_batch_size, seq_length]

The order does not depend on the world size or the number of steps. A run can therefore continue in any layout.
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
from train.sample_order import Reading, interleave, load_evaluated, usable_shards, weights_of
from train.sources import Batch, ReadError, Source, reserve_descriptors

VALIDATION_SEED = 1234
"""Seed of the order of validation sequences. It is the same for all runs, so that their losses are comparable."""


class Blend(Dataset[Batch]):
    """Sources interleaved by weight with Megatron-Core's greedy rule. Sample i does not depend on the number of samples."""

    def __init__(self, sources: list[Source], source_of: np.ndarray, index_in: np.ndarray) -> None:
        self.sources, self.source_of, self.index_in = sources, source_of, index_in

    def __getitem__(self, index: int) -> Batch:
        return self.sources[int(self.source_of[index])][int(self.index_in[index])]

    def __len__(self) -> int:
        return len(self.source_of)


@dataclass(frozen=True)
class RunData:
    """Training and validation data of a run."""

    train: Blend
    """Training samples, starting at sample `order["start"]` of the run."""
    validation: dict[str, Source]
    """Validation source by name."""
    evaluated: dict[str, Source]
    """Sources of evaluation.text by name."""
    unvalidated: list[str]
    """Names of sources with less validation text than one sequence."""
    order: dict[str, Any]
    """Order of samples, from `plan_order`."""
    files: dict[Path, tuple[int, int]]
    """Size in bytes and modification time in ns of every shard at the start of the run."""
    unigram_entropy: float
    """Mean unigram entropy of the validated sources in nats per token."""
    reading: list[Reading]
    """Tokens and epochs of each source."""

    def changed_file(self) -> Path | None:
        """A shard whose size or modification time has changed since the start of the run, or None."""
        return next((path for path, before in self.files.items() if _look_at(path) != before), None)


def _look_at(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (-1, -1)
    return (found.st_size, found.st_mtime_ns)


def load_data(config: RunConfig, manifests: list[Manifest], order: dict[str, Any], *, samples: int) -> RunData:
    """Build the order of samples, on rank 0 first, and open the data; a collective on every rank.

    order: from `plan_order`. samples: total number of training samples at the end of the run, including those before a
    resume.

    Raises ReadError for a damaged shard, DataError if the limit of open files is too low for the shards.
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
    evaluated = {
        manifest.name: Source(manifest, split, sequence_length=length, seed=VALIDATION_SEED, cache=cache)
        for manifest, split in load_evaluated(config, manifests)
    }
    held_out = [*validation.values(), *evaluated.values()]
    reserve_descriptors([*sources, *held_out])
    # On file systems without locks, all ranks would otherwise write the same files at the same time.
    for turn in (True, False):
        if turn == (dist.get_rank() == 0):
            for source, first in [*zip(sources, read.tolist(), strict=True), *((source, 0) for source in held_out)]:
                source.open_epoch(first)
        dist.barrier()
    shards = [manifest.folder / name for manifest in manifests for shard in manifest.shards for name, *_ in shard.files()]
    counts = np.bincount(source_of, minlength=len(read)) + read
    return RunData(
        train=Blend(sources, source_of, index_in + read[source_of]),
        validation=validation,
        evaluated=evaluated,
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
    """This rank's micro-batches of samples [start, stop).

    A global micro-batch consists of data_size consecutive parts, one for each data-parallel rank. The number of
    micro-batches is rounded up to a multiple of `multiple_of`, for interleaved pipelines. Samples beyond `stop` are copies
    of sample `start` with an empty loss mask, so that every rank has the same number of micro-batches.
    """
    if num_workers:
        kill_daemons_at_exit()  # workers survive an exception whose traceback references the loader
    width = micro_batch_size * data_size * multiple_of
    rows = range(data_rank * micro_batch_size, (data_rank + 1) * micro_batch_size)
    end = start + -(-(stop - start) // width) * width
    # A generator, since a long run has hundreds of millions of samples.
    batches = ([first + row for row in rows] for first in range(start, end, micro_batch_size * data_size))
    loader: DataLoader[Batch] = DataLoader(
        _Padded(dataset, start, stop),
        batch_sampler=batches,
        num_workers=num_workers,
        worker_init_fn=outlive_signals,
        # A separate generator: each loader draws a seed at its start, and a resumed run starts one loader more.
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except ReadError as error:
        # The message of a worker's error contains the traceback, followed by the original message.
        raise ReadError(str(error).strip().rpartition("ReadError: ")[2]) from None


class _Padded(Dataset[Batch]):
    """A dataset in which samples from `stop` on are sample `start` with an empty loss mask."""

    def __init__(self, dataset: Dataset[Batch], start: int, stop: int) -> None:
        self.dataset, self.start, self.stop = dataset, start, stop

    def __getitem__(self, index: int) -> Batch:
        if index < self.stop:
            return self.dataset[index]
        sample = self.dataset[self.start]
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])}
