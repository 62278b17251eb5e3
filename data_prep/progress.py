"""Reports the progress of a pass over a corpus: files, tokens, share of the corpus, rate, time left.

for path in counted(paths, "wikipedia: files hashed", 5.0): ...
progress = Progress(corpus, every_seconds=5, start=position)
for record in progress.watch(corpus.records(position)): ...
progress.add(tokens=12345)
progress.close()
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from mone_common.text import clock

if TYPE_CHECKING:
    from data_prep.corpora import Corpus, Position, Record

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


def counted(items: Sequence[Item], what: str, every_seconds: float) -> Iterator[Item]:
    """Yield the items; log `what` and the number of items done every `every_seconds`."""
    logged = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - logged >= every_seconds:
            logged = time.monotonic()
            logger.info(f"{what}: {number:,} of {len(items):,}")
        yield item


class Progress:
    """Reports one line every few seconds."""

    def __init__(self, corpus: "Corpus", every_seconds: float, start: "Position") -> None:
        self._corpus, self._every_seconds = corpus, every_seconds
        self._file = start.file
        self._text_per_byte = 1.0
        self._file_text = self._text = 0
        self._tokens = 0
        self._begin = self._logged = time.monotonic()
        self._share_at_begin = self.share()

    def watch(self, records: Iterable["Record"]) -> Iterator["Record"]:
        """Yield the records and count them."""
        sizes = self._corpus.sizes
        for number, record in enumerate(records):
            another_file = record.next.file != self._file
            if another_file:
                if sizes[self._file]:
                    self._text_per_byte = max(self._file_text, 1) / sizes[self._file]
                self._file, self._file_text = record.next.file, 0
            self._file_text += len(record.text)
            self._text += len(record.text)
            if another_file or number % 1000 == 999:
                self._log_when_due()
            yield record

    def add(self, tokens: int) -> None:
        """Add encoded tokens to the count."""
        self._tokens += tokens
        self._log_when_due()

    def share(self) -> float:
        """Estimated share of the corpus's bytes that have been read; 0 if the size is unknown.

        Within a file, the estimate uses the characters per byte of the previous file, because files may be compressed.
        """
        sizes = self._corpus.sizes
        if not sum(sizes):
            return 0.0
        here = min(self._file_text / self._text_per_byte, sum(sizes[self._file : self._file + 1]))
        return (sum(sizes[: self._file]) + here) / sum(sizes)

    def close(self) -> None:
        """Report the last line."""
        self._file_text, self._file = 0, len(self._corpus.sizes)
        self._log()

    def _log_when_due(self) -> None:
        if time.monotonic() - self._logged >= self._every_seconds:
            self._log()

    def _log(self) -> None:
        self._logged = time.monotonic()
        seconds = max(self._logged - self._begin, 1e-9)
        line = f"{self._corpus.name}: "
        if (files := len(self._corpus.sizes)) > 1:
            line += f"file {min(self._file + 1, files):,} of {files:,}, "
        line += f"{self._text / 1e6:,.1f}M characters"
        if self._tokens:
            line += f", {self._tokens / 1e6:,.1f}M tokens, {self._tokens / seconds:,.0f} tokens/s"
        if (gained := self.share() - self._share_at_begin) > 0:
            left = int((1 - self.share()) * seconds / gained)
            line += f", {self.share():.0%}, {clock(left)} left"
        logger.info(line)
