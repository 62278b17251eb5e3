"""Encodes texts in worker processes; the results keep the order of the input.

    with EncoderPool("data/demo/tokenizer", validation_fraction=0.01, workers=2) as pool:
        for records, encoded in pool.encode(corpus.records()):
            for record, document in zip(records, encoded.documents()): ...

A worker has only the tokenizer. It exits when its parent exits or is killed.
"""

import hashlib
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.corpora import Record
from data_prep.errors import DataError
from data_prep.shards import dtype_of, range_problem
from data_prep.tokenizer import Tokenizer, load_tokenizer
from mone_common.processes import end_with_parent

BATCH_CHARACTERS = 1 << 20
BATCH_RECORDS = 1 << 14
BATCHES_PER_WORKER = 3
"""Batches in flight per worker: enough to keep it busy, few enough to bound memory."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a batch of N texts, packed into two arrays for transfer between processes."""

    tokens: np.ndarray
    """[sum of lengths], dtype as on disk; each document ends with the end-of-document token."""
    lengths: np.ndarray
    """[N] tokens of each text; 0 for an empty text, which is not a document."""
    validation: list[bool]
    """[N] whether the text belongs to the validation split."""

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each text [length], in order."""
        ends = np.cumsum(self.lengths).tolist()
        return (self.tokens[start:end] for start, end in itertools.pairwise([0, *ends]))


def is_validation(text: str, fraction: float) -> bool:
    """Whether the first 64 bits of the text's blake2b, as a number in [0, 1), are below `fraction`.

    It depends only on the text, not on order, number of workers or other documents. Equal texts are always in the same
    split.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def encode_batch(tokenizer: Tokenizer, texts: list[str], validation_fraction: float) -> Encoded:
    """Encode texts [N], with an end-of-document token after each that is not empty.

    Raises DataError for an id outside the vocabulary.
    """
    documents = tokenizer.encode_documents([text for text in texts if text])
    lengths = np.zeros(len(texts), np.int64)
    lengths[[bool(text) for text in texts]] = [len(document) for document in documents]
    tokens = np.concatenate([np.empty(0, np.int32), *documents])
    if problem := range_problem(tokens, tokenizer.vocab_size):
        raise DataError(f"tokenizer: {problem}: it produces ids that are not in its vocabulary")
    tokens = tokens.astype(dtype_of(tokenizer.vocab_size))
    return Encoded(tokens, lengths, [is_validation(text, validation_fraction) for text in texts])


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: str, validation_fraction: float) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    end_with_parent(parent.pid)  # without it, workers of a killed parent would wait for work forever
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; only the parent handles it
    _worker.update(tokenizer=load_tokenizer(tokenizer), validation_fraction=validation_fraction)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return encode_batch(_worker["tokenizer"], texts, _worker["validation_fraction"])


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records until a batch has BATCH_CHARACTERS of text or BATCH_RECORDS records."""
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_RECORDS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class EncoderPool:
    """`workers` processes, each with its own tokenizer; they are spawned, because fork is unsafe with threads."""

    def __init__(self, tokenizer: str, validation_fraction: float, workers: int) -> None:
        self._under_way = BATCHES_PER_WORKER * workers
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(tokenizer, validation_fraction),
        )

    def __enter__(self) -> "EncoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def encode(self, records: Iterable[Record]) -> Iterator[tuple[list[Record], Encoded]]:
        """Each batch of records with its tokens, in order; DataError if a worker dies."""
        waiting: deque[tuple[list[Record], Future[Encoded]]] = deque()
        try:
            for batch in batches(records):
                waiting.append((batch, self._pool.submit(_encode_in_worker, [record.text for record in batch])))
                if len(waiting) >= self._under_way:
                    done, future = waiting.popleft()
                    yield done, future.result()
            for done, future in waiting:
                yield done, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died; the machine may be out of memory. Finished shards are kept: run the same command "
                "again to continue, with fewer workers if memory is short"
            ) from error
