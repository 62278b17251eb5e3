"""Opens text files: decompresses them, skips a byte order mark, and marks bytes that are not UTF-8.

    with open_text(Path("corpus.jsonl.zst"), newline="\\n") as lines:
        for line in lines: ...                   # INVALID replaces each byte that is not UTF-8

A compressed file may contain several concatenated frames ("members", "streams"), e.g. from `cat a.gz b.gz`. A file that ends
within a frame is an error; some packages' decompressors ignore the truncation.
"""

import bz2
import codecs
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from data_prep.errors import DataError

# This pair of noncharacters replaces each undecodable byte, so that its record can be found later. Valid text does not
# contain it.
INVALID = "\ufdd0\ufdef"
MARK_INVALID = "data_prep_mark_invalid"
BUFFER_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 14
"""Compressed bytes that are decompressed at once; small, because the text may be a thousand times larger."""


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return INVALID * (error.end - error.start), error.end


codecs.register_error(MARK_INVALID, _mark_invalid)


def _zstandard() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # the window of `zstd --long=31`


def _lz4() -> Any:
    import lz4.frame

    return lz4.frame.LZ4FrameDecompressor()


# Each creates a decompressor of one frame with `eof` (end reached) and `unused_data` (bytes after the end).
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),  # in automatic mode, zeros are an empty .lzma file
    "zst": _zstandard,
    "lz4": _lz4,
}


def compression_of(path: Path) -> str:
    """Key of `DECOMPRESSORS` for the file's suffix; "" for a file that is not compressed."""
    suffix = path.suffix[1:].lower()
    return suffix if suffix in DECOMPRESSORS else ""


def open_text(path: Path, newline: str | None) -> TextIO:
    """Open a text file, compressed or not, for reading; `newline` as in `open`.

    Raises DataError for a file in UTF-16 or UTF-32. Reading raises EOFError if a frame is not complete, and the
    decompressor's error if one is damaged.
    """
    file: Any = open(path, "rb", buffering=BUFFER_BYTES)  # noqa: SIM115  the caller closes it
    if compression := compression_of(path):
        frames = _decompressed(file, DECOMPRESSORS[compression])
        file = io.BufferedReader(_Chunks(file, frames), BUFFER_BYTES)
    try:
        start = file.peek()
        if encoding := _other_encoding(start):
            name = encoding.replace("-LE", "LE").replace("-BE", "BE")  # the name that iconv uses
            raise DataError(f"encoded in {encoding}, not in UTF-8. Convert it: iconv -f {name} -t UTF-8")
        if start.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
    except BaseException:
        file.close()
        raise
    return io.TextIOWrapper(file, encoding="utf-8", errors=MARK_INVALID, newline=newline)


def _other_encoding(start: bytes) -> str:
    """The encoding if the start of a file has the byte order mark or the zeros of UTF-16 or UTF-32, else ""."""
    encoding = json.detect_encoding(start).upper()
    marked = encoding in ("UTF-16", "UTF-32")
    zeros = start.count(0) * 4 >= len(start)  # a UTF-8 text may contain a few zeros
    return encoding if marked or (zeros and encoding.startswith(("UTF-16", "UTF-32"))) else ""


def _decompressed(file: BinaryIO, decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """The content of all frames of a file; EOFError if the last one is not complete, or if there is none."""
    frame = None
    finished = 0
    while chunk := file.read(COMPRESSED_BYTES):
        while chunk:
            if frame is None:
                if finished and not (chunk := chunk.lstrip(b"\0")):  # padding, which gzip and xz allow
                    break
                frame = decompressor()
            yield frame.decompress(chunk)
            chunk = b""
            if frame.eof:
                chunk, frame, finished = frame.unused_data, None, finished + 1
    if frame or not finished:
        raise EOFError("the file ends within compressed data: it is truncated")


class _Chunks(io.RawIOBase):
    """A file object over an iterator of bytes; closing it closes `source`."""

    def __init__(self, source: BinaryIO, chunks: Iterator[bytes]) -> None:
        self._source, self._chunks = source, chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Return the rest of the current chunk only, so that all content before a damaged chunk is read."""
        while not self._rest:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._rest = memoryview(chunk)
        piece = self._rest[: len(buffer)]
        buffer[: len(piece)] = piece
        self._rest = self._rest[len(piece) :]
        return len(piece)

    def close(self) -> None:
        self._source.close()
        super().close()
