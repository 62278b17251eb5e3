"""How far a tokenization is: tokens, share of the corpus, rate, time left.

progress = Progress(corpus, every_seconds=5)
progress.add(records, tokens=12345)
progress.close()
"""

import sys
import time

from data_prep.corpora import Corpus, Position, Record


class Progress:
    """Prints a line to stderr every few seconds."""

    def __init__(self, corpus: Corpus, every_seconds: float, start: Position) -> None:
        self._corpus, self._every_seconds = corpus, every_seconds
        self._sizes = [path.stat().st_size for path in corpus.files]
        self._file = start.file
        self._text_per_byte = 1.0
        self._file_text = 0
        self._tokens = 0
        self._begin = self._printed = time.monotonic()
        self._share_at_begin = self.share()

    def add(self, records: list[Record], tokens: int) -> None:
        """Count a batch of records that became so many tokens."""
        self._tokens += tokens
        for record in records:
            if record.next.file != self._file:
                self._text_per_byte = max(self._file_text, 1) / max(self._sizes[self._file], 1)
                self._file, self._file_text = record.next.file, 0
            self._file_text += len(record.text)
        if time.monotonic() - self._printed >= self._every_seconds:
            self._print()

    def share(self) -> float:
        """Estimated share of the corpus's bytes that are done; 0 where the size is unknown.

        Inside a file it goes by the text per byte of the file before, compressed or not.
        """
        if not sum(self._sizes):
            return 0.0
        here = min(self._file_text / self._text_per_byte, sum(self._sizes[self._file : self._file + 1]))
        return (sum(self._sizes[: self._file]) + here) / sum(self._sizes)

    def close(self) -> None:
        """Print the last line."""
        self._file_text, self._file = 0, len(self._sizes)
        self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        seconds = max(self._printed - self._begin, 1e-9)
        line = f"{self._corpus.name}: {self._tokens / 1e6:.1f}M tokens, {self._tokens / seconds:,.0f} tokens/s"
        if (gained := self.share() - self._share_at_begin) > 0:
            left = int((1 - self.share()) * seconds / gained)
            line += f", {self.share():.0%}, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        print(line, file=sys.stderr)
