"""Text files as characters: decompressed, without a byte order mark, undecodable bytes marked.

    with open_text(Path("corpus.jsonl.zst"), newline="\\n") as lines:
        for line in lines: ...                   # INVALID where a byte was not UTF-8

A compressed file may consist of several frames ("members", "streams"), one behind the other, as `cat a.gz b.gz` makes
them. One that ends within a frame is refused: the decompressors of some packages end there without an error.
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

# Each undecodable byte becomes this pair of noncharacters, which no valid text interchanges, so that the
# record that holds it can be found wherever the file was decoded.
INVALID = "\ufdd0\ufdef"
MARK_INVALID = "data_prep_mark_invalid"
BUFFER_BYTES = 1 << 20
COMPRESSED_BYTES = 1 << 14
"""Compressed bytes that are decompressed at once; small, since some texts shrink to a thousandth."""


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


# Each makes an object that decompresses one frame, and tells its end (`eof`) and what is behind it (`unused_data`).
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "bz2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),  # zeros would be an empty file of the older format
    "zst": _zstandard,
    "lz4": _lz4,
}


def compression_of(path: Path) -> str:
    """Key of `DECOMPRESSORS` that the file's suffix tells; "" for a file that is not compressed."""
    suffix = path.suffix[1:].lower()
    return suffix if suffix in DECOMPRESSORS else ""


def open_text(path: Path, newline: str | None) -> TextIO:
    """Open a text file, compressed or not, for reading; `newline` as in `open`.

    Raises DataError for a file in UTF-16 or UTF-32. Reading raises EOFError if a frame is not complete, and what the
    decompressor raises if one is damaged.
    """
    file: Any = open(path, "rb", buffering=BUFFER_BYTES)  # noqa: SIM115  the caller closes it
    if compression := compression_of(path):
        frames = _decompressed(file, DECOMPRESSORS[compression])
        file = io.BufferedReader(_Chunks(file, frames), BUFFER_BYTES)
    try:
        start = file.peek()
        if encoding := _other_encoding(start):
            name = encoding.replace("-LE", "LE").replace("-BE", "BE")  # as iconv spells it
            raise DataError(f"encoded in {encoding}, not in UTF-8. Convert it: iconv -f {name} -t UTF-8")
        if start.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
    except BaseException:
        file.close()
        raise
    return io.TextIOWrapper(file, encoding="utf-8", errors=MARK_INVALID, newline=newline)


def _other_encoding(start: bytes) -> str:
    """UTF-16 or UTF-32 if the start of a file has its byte order mark or its zeros, else ""."""
    encoding = json.detect_encoding(start).upper()
    marked = encoding in ("UTF-16", "UTF-32")
    zeros = start.count(0) * 4 >= len(start)  # a text in UTF-8 may hold some, too
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
    """Pieces of content as a file; closes the file that they come from."""

    def __init__(self, source: BinaryIO, chunks: Iterator[bytes]) -> None:
        self._source, self._chunks = source, chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Give what is left of a piece, so that all content before damage is read."""
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
