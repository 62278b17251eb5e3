"""The sequences of one source of a blend over many epochs, each with its own order.

    source = Source(manifest, "train", sequence_length=1024, seed=1234, cache=Path("runs/demo/index_cache"))
    source.size                         # sequences per epoch
    source[i]["tokens"]                 # [sequence_length]; i continues over epochs

Sequence i depends only on the shards, the seed and i. In each epoch, the documents of each shard are shuffled and cut into
sequences, the sequences are shuffled, and the shards are interleaved by size. It is the order of Megatron-Core's GPTDataset
and BlendedDataset with the seed `seed + epoch`. Unlike there, one open file serves all epochs, and the order of an epoch is
computed when the epoch is reached. Every process computes small orders; large orders are stored in shared files.
"""

import hashlib
import json
import math
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch.utils.data import Dataset

from data_prep.errors import DataError, naming_folder
from data_prep.shard_index import index_problems
from data_prep.shards import Manifest, Split, range_problem
from mone_common.console import UserError
from mone_common.files import writing
from mone_common.locks import LOCK_FILE, lock
from train.sample_order import usable_shards

Batch = dict[str, torch.Tensor]

SMALL_ORDER_BYTES = 4 << 20
"""Orders up to this size are computed in a few hundredths of a second and not stored in files."""
ORDERS_IN_USE = 2
"""Orders of a source in memory: around the end of an epoch, two are in use."""
FILES_OF_A_SHARD = 3
"""File descriptors of Megatron-Core's IndexedDataset."""
MAX_SHARDS = 2**15 - 1
"""Largest number of shards of a split; Megatron-Core numbers them in int16."""


class ReadError(UserError):
    """An error in reading data. Only this rank has it, so no collective may follow."""


class Source(Dataset[Batch]):
    """One split of one source."""

    def __init__(self, manifest: Manifest, split: Split, *, sequence_length: int, seed: int, cache: Path) -> None:
        """DataError if there are more than MAX_SHARDS shards."""
        self.manifest, self.sequence_length, self.seed, self.cache = manifest, sequence_length, seed, cache
        self.shards = usable_shards(manifest, split, sequence_length)
        if len(self.shards) > MAX_SHARDS:
            raise DataError(
                f"data.blend: {manifest.folder} has {len(self.shards)} {split} shards, at most {MAX_SHARDS} can be read; "
                "tokenize with larger shard_tokens"
            )
        self.sizes = [(shard.tokens - 1) // sequence_length for shard in self.shards]
        self.size = sum(self.sizes)
        # The order has for each shard: its documents, the bounds of its sequences, and their numbers.
        lengths = [shard.documents + 2 * (n + 1) + n for shard, n in zip(self.shards, self.sizes, strict=True)]
        self._starts = np.cumsum([0, *lengths])
        self._content = hashlib.sha256(json.dumps([[s.bin_sha256, s.idx_sha256] for s in self.shards]).encode()).hexdigest()
        self._datasets: dict[int, Any] = {}
        self._checked: set[int] = set()
        self._orders: dict[int, np.ndarray] = {}
        self._turns: np.ndarray | None = None

    def __len__(self) -> int:
        """Sequences per epoch; the number of epochs is not limited."""
        return self.size

    def __getitem__(self, index: int) -> Batch:
        """Sequence `index`: tokens, labels, loss_mask, position_ids [sequence_length].

        Raises ReadError if a shard does not match its manifest, or the file of an order is damaged.
        """
        try:
            tokens = self._read(*divmod(index, self.size))
        except UserError as error:
            raise ReadError(str(error)) from error
        text_S = torch.from_numpy(tokens)
        return {
            "tokens": text_S[:-1],
            "labels": text_S[1:],
            "loss_mask": torch.ones(self.sequence_length),
            "position_ids": torch.arange(self.sequence_length),
        }

    def open_epoch(self, index: int) -> None:
        """Prepare the order of the epoch of sequence `index`; ReadError for a damaged index file."""
        self._order(index // self.size)
        self._turn(index % self.size)

    def _turn(self, place: int) -> tuple[int, int]:
        """The shard at a position of an epoch, and the sequence of that shard."""
        if len(self.shards) == 1:
            return 0, place
        if self._turns is None:
            self._turns = self._cached("turns", [], 2 * self.size, self._take_turns)
        number, sequence = int(self._turns[place]), int(self._turns[self.size + place])
        if not (0 <= number < len(self.shards) and 0 <= sequence < self.sizes[number]):
            raise self._damaged_order("turns", [], f"sequence {sequence} of shard {number}, which does not exist")
        return number, sequence

    def _take_turns(self) -> np.ndarray:
        shard_of, number_in = np.zeros(self.size, np.int16), np.zeros(self.size, np.int64)
        helpers.build_exhaustive_blending_indices(shard_of, number_in, self.sizes, len(self.sizes))
        return np.concatenate([shard_of, number_in], dtype=np.int32, casting="same_kind")

    def _order(self, epoch: int) -> np.ndarray:
        """[sum of lengths] int32; see `_starts`."""
        if epoch not in self._orders:
            for earlier in list(self._orders)[: 1 - ORDERS_IN_USE]:
                del self._orders[earlier]
            seed = self.seed + epoch
            self._orders[epoch] = self._cached("order", [seed], int(self._starts[-1]), lambda: self._shuffle(seed))
        return self._orders[epoch]

    def _shuffle(self, seed: int) -> np.ndarray:
        parts: list[np.ndarray] = []
        for number, shard in enumerate(self.shards):
            self._check(number)
            random = np.random.RandomState(seed)
            documents = np.arange(shard.documents, dtype=np.int32)
            random.shuffle(documents)
            lengths = self._dataset(number).sequence_lengths
            bounds = helpers.build_sample_idx(lengths, documents, self.sequence_length, 1, shard.tokens, True, True)
            sequences = np.arange(self.sizes[number], dtype=np.int32)
            random.shuffle(sequences)
            parts += [documents, bounds.reshape(-1), sequences]
        return np.concatenate(parts, dtype=np.int32, casting="same_kind")

    def _check(self, number: int) -> None:
        """Check a shard's whole index, which Megatron-Core's compiled code does not check; ReadError if it is damaged."""
        if number not in self._checked:
            folder, shard = self.manifest.folder, self.shards[number]
            if problem := next(index_problems(folder, shard, self.manifest.dtype), None):
                raise self._damaged(problem)
            self._checked.add(number)

    def _dataset(self, number: int) -> Any:
        if number not in self._datasets:
            self._datasets[number] = IndexedDataset(str(self.manifest.folder / self.shards[number].name))
        return self._datasets[number]

    def _read(self, epoch: int, place: int) -> np.ndarray:
        """The tokens [sequence_length + 1] int64 at a position of an epoch."""
        number, sequence = self._turn(place)
        shard, size = self.shards[number], self.sizes[number]
        order = self._order(epoch)[self._starts[number] : self._starts[number + 1]]
        documents, bounds, sequences = np.split(order, [shard.documents, shard.documents + 2 * (size + 1)])
        if not 0 <= (place_in := int(sequences[sequence])) < size:
            raise self._damaged_order("order", [self.seed + epoch], f"sequence {place_in} of {size} in {shard.name}")
        first, start, last, end = bounds[2 * place_in : 2 * place_in + 4].tolist()
        within = documents[first : last + 1] if 0 <= first <= last < shard.documents else documents[:0]
        is_place = start >= 0 and end >= (start if first == last else 0)
        if not (is_place and len(within) and within.min() >= 0 and within.max() < shard.documents):
            raise self._damaged_order("order", [self.seed + epoch], f"the documents of sequence {place_in} in {shard.name}")
        try:
            dataset = self._dataset(number)
            if first == last:
                parts = [dataset.get(int(documents[first]), offset=start, length=end - start + 1)]
            else:
                parts = [dataset.get(int(documents[first]), offset=start)]
                parts += [dataset.get(document) for document in documents[first + 1 : last].tolist()]
                parts += [dataset.get(int(documents[last]), length=end + 1)]
        except (ValueError, IndexError, AssertionError) as error:
            raise self._damaged(f"{shard.name}: damaged ({type(error).__name__}: {error})") from error
        tokens = np.concatenate(parts, dtype=np.int64)
        if len(tokens) != self.sequence_length + 1:
            length = f"a sequence of {len(tokens) - 1} tokens in {shard.name}"
            raise self._damaged_order("order", [self.seed + epoch], length)
        if problem := range_problem(tokens, self.manifest.vocab_size):
            raise self._damaged(f"{shard.name}.bin: {problem}")
        return tokens

    def _damaged(self, problem: str) -> ReadError:
        folder = self.manifest.folder
        return ReadError(f"data.blend: {folder}: {problem}. Run mone-verify path={folder} for a full list")

    def _damaged_order(self, kind: str, of: list[int], problem: str) -> ReadError:
        path = self._file(kind, of)
        if not path.is_file():  # the order was computed from the shards
            return self._damaged(problem)
        return ReadError(f"data.index_cache={self.cache}: {path.name}: damaged ({problem}). Delete it; it is created again")

    def _file(self, kind: str, of: list[int]) -> Path:
        """File of an array that is not small."""
        key = hashlib.sha256(json.dumps([kind, self._content, self.sequence_length, *of]).encode()).hexdigest()
        return self.cache / f"{kind}-{key[:32]}.npy"

    def _cached(self, kind: str, of: list[int], length: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array [length] int32: computed if it is small, else loaded from its file, which the first process writes."""
        if 4 * length <= SMALL_ORDER_BYTES:
            return make()
        path = self._file(kind, of)
        with naming_folder("data.index_cache", self.cache, shared=True):
            found = _load_whole(path, length)
            if found is None:
                self.cache.mkdir(parents=True, exist_ok=True)
                with open(self.cache / LOCK_FILE, "w") as file:
                    lock(file, wait=True)
                    found = _load_whole(path, length)
                    if found is None:
                        # Without locks across machines, several processes may write it, each under its own temporary name.
                        with writing(path, shared=True) as temporary, open(temporary, "wb") as written:
                            np.save(written, make())
                        found = _load_whole(path, length)
        assert found is not None
        return found


def _load_whole(path: Path, length: int) -> np.ndarray | None:
    """The memory-mapped array of a file; None if the file is missing or invalid."""
    try:
        found = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return found if found.shape == (length,) and found.dtype == np.int32 else None


def reserve_descriptors(sources: list[Source]) -> None:
    """Raise the limit of open files as these sources need; DataError if the hard limit is too low."""
    shards = sum(len(source.shards) for source in sources)
    # Files of the orders, and a reserve for checkpoints, sockets and W&B.
    least = len(os.listdir("/dev/fd")) + FILES_OF_A_SHARD * shards + (ORDERS_IN_USE + 1) * len(sources) + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = math.inf if hard == resource.RLIM_INFINITY else hard
    if allowed < least:
        raise DataError(
            f"data.blend: its {shards} shards need {least} open files, but the hard limit is {hard}. Raise the hard "
            f"limit (ulimit -Hn) to at least {least}, or tokenize with larger shard_tokens"
        )
    if soft != resource.RLIM_INFINITY and soft < least + 256:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(min(least + 256, allowed)), hard))
