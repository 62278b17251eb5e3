"""Every codec in every text format: one frame, several, damaged ones, none; byte order marks; files without records."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import lz4.frame
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from data_prep.corpora import Corpus, CorpusConfig
from data_prep.errors import DataError

CODECS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
    "lz4": lz4.frame.compress,
}
TEXTS = [f"Document {n * 7919 % 10007} says something." for n in range(400)]
FORMATS: dict[str, Callable[[list[str]], bytes]] = {
    "txt": lambda texts: "".join(text + "\n\n" for text in texts).encode(),
    "md": lambda texts: "".join(text + "\n\n" for text in texts).encode(),
    "jsonl": lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
    "ndjson": lambda texts: "".join(json.dumps({"text": text}) + "\n" for text in texts).encode(),
    "json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    "csv": lambda texts: b"text,id\n" + "".join(f"{text},7\n" for text in texts).encode(),
    "tsv": lambda texts: b"text\tid\n" + "".join(f"{text}\t7\n" for text in texts).encode(),
}


def read(path: Path, content: bytes, **options: str) -> list[str]:
    """The texts of a file with this content, read from the start and from a record in the middle."""
    path.write_bytes(content)
    corpus = Corpus(CorpusConfig(path=str(path), **options))
    records = list(corpus.records())
    for record in records[200:201]:
        assert list(corpus.records(start=record.next)) == records[201:]
    return [record.text.strip() for record in records]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_compressed_file_is_read_whole_or_refused(tmp_path: Path, format: str, codec: str) -> None:
    path, compress = tmp_path / f"a.{format}.{codec}", CODECS[codec]
    content = FORMATS[format](TEXTS)
    one = compress(content)
    assert read(path, one) == TEXTS
    cut = content.index(b" says", len(content) // 2)  # within a record
    several = [compress(content[:cut]), compress(b""), compress(content[cut:])]
    assert read(path, b"".join(several)) == TEXTS
    assert read(path, compress(b"")) == []
    for truncated in (b"", one[:-1], one[: len(one) // 2], one[:5], b"".join(several)[:-3], one + one[:3]):
        with pytest.raises(DataError, match=rf"a\.{format}\.{codec}, after record \d+: .*truncated"):
            read(path, truncated)
    for damaged in (b"no such compression " * 9, one + b"garbage " * 9, b"\0" * 99):
        with pytest.raises(DataError, match=rf"a\.{format}\.{codec}, after record \d+: cannot be read as"):
            read(path, damaged)


def test_padding_between_frames_is_skipped(tmp_path: Path) -> None:
    content = FORMATS["jsonl"](TEXTS)
    skippable = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"abcde"
    assert read(tmp_path / "pzstd.jsonl.zst", skippable + zstandard.compress(content)) == TEXTS
    assert read(tmp_path / "tape.jsonl.gz", gzip.compress(content) + b"\0" * 40_000) == TEXTS
    large_window = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)  # as of zstd --long=30
    compressor = zstandard.ZstdCompressor(compression_params=large_window).compressobj()
    assert read(tmp_path / "long.jsonl.zst", compressor.compress(content) + compressor.flush()) == TEXTS


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_compressed_tables_are_refused_by_name(tmp_path: Path, format: str) -> None:
    (tmp_path / f"a.{format}.zst").write_bytes(b"")
    with pytest.raises(DataError, match=rf"a\.{format}\.zst: {format} files have internal compression"):
        Corpus(CorpusConfig(path=str(tmp_path)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_byte_order_mark_is_removed(tmp_path: Path, format: str) -> None:
    content = FORMATS[format](TEXTS)
    assert read(tmp_path / f"a.{format}", b"\xef\xbb\xbf" + content) == TEXTS
    assert read(tmp_path / f"b.{format}.gz", gzip.compress(b"\xef\xbb\xbf" + content)) == TEXTS
    assert read(tmp_path / f"c.{format}", b"\xef\xbb\xbf") == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("format", FORMATS)
def test_another_encoding_is_named(tmp_path: Path, format: str, encoding: str) -> None:
    content = FORMATS[format](TEXTS).decode().encode(encoding)
    name = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    message = rf"a\.{format}, record 1: encoded in {encoding.upper()}, not in UTF-8\. Convert it: iconv -f {name} -t UTF-8$"
    with pytest.raises(DataError, match=message):
        read(tmp_path / f"a.{format}", content)


@pytest.mark.parametrize("sample_by", ["line", "paragraph", "document"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_file_of_no_bytes_has_no_records(tmp_path: Path, format: str, sample_by: str) -> None:
    assert read(tmp_path / f"a.{format}", b"", sample_by=sample_by) == []


@pytest.mark.parametrize("header", [b"text\n", b"id,name\r\n", b"\n"])
def test_a_table_of_a_header_alone_has_no_records(tmp_path: Path, header: bytes) -> None:
    assert read(tmp_path / "a.csv", header) == []


@pytest.mark.parametrize("schema", [{"text": pa.string()}, {"id": pa.int64()}, {}])
def test_a_batch_without_rows_is_skipped(tmp_path: Path, schema: dict[str, pa.DataType]) -> None:
    empty = pa.table({name: pa.array([], kind) for name, kind in schema.items()})
    parts = [pa.table({"text": ["first"]}), empty, pa.table({"text": ["last"]})]
    for number, part in enumerate(parts):
        pyarrow.parquet.write_table(part, tmp_path / f"part-{number}.parquet")
        with pa.ipc.new_stream(tmp_path / f"part-{number}.arrow", part.schema) as stream:
            stream.write_table(part)
    for format in ("parquet", "arrow"):
        records = Corpus(CorpusConfig(path=str(tmp_path / f"*.{format}"))).records()
        assert [record.text for record in records] == ["first", "last"]


def test_an_arrow_stream_that_is_cut_between_batches_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    whole = (tmp_path / "a.arrow").read_bytes()
    assert read(tmp_path / "a.arrow", whole) == TEXTS
    for content in (b"", whole[:-8], whole[:-300]):
        with pytest.raises(DataError, match=r"a\.arrow, after record \d+: cannot be read as arrow"):
            read(tmp_path / "a.arrow", content)


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_a_table_of_no_bytes_is_refused(tmp_path: Path, format: str) -> None:
    with pytest.raises(DataError, match=rf"a\.{format}, after record 0: cannot be read as {format} \(.*\)$"):
        read(tmp_path / f"a.{format}", b"")
    with pytest.raises(DataError, match=rf"a\.{format}, .*cannot be read as {format} \(.*\)\. .* set corpus\.format$"):
        read(tmp_path / f"a.{format}", b"something else of some length")
