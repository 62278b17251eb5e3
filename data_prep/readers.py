"""Reads one field of a file, or of a dataset on the Hugging Face hub, record by record.

    for value in read_file(Path("corpus.parquet"), "parquet", field="text"):
        value        # str, None, or any other JSON value; INVALID for bytes that are not UTF-8

Files are read with pyarrow and Python's json and csv modules. Only datasets of the hub are read with the `datasets` library:
for local files it connects to the hub, requires one schema for all records, and returns cells of wrong columns if the rows
of a table are shorter or longer than its header.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from data_prep.csv_files import check_field, read_table
from data_prep.errors import DataError
from data_prep.text_files import INVALID, MARK_INVALID, compression_of, open_text

FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet", "arrow")
BINARY_FORMATS = ("parquet", "arrow")
"""Formats that need random access, which compressed files do not allow."""
SUFFIXES = {".txt": "text", ".md": "text", ".ndjson": "jsonl"} | {f".{name}": name for name in FORMATS}
SAMPLES = ("line", "paragraph", "document")
ROWS = 1000
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON can contain half of a surrogate pair, which UTF-8 cannot encode; the decoder has joined whole pairs already."""
ARROW_STREAM_START, ARROW_STREAM_END = b"\xff\xff\xff\xff", b"\xff\xff\xff\xff\0\0\0\0"


def format_of(path: Path) -> str:
    """The format according to a file's suffix, ignoring a suffix of a compression; "" if the suffix is unknown."""
    name = path.with_suffix("") if compression_of(path) else path
    return SUFFIXES.get(name.suffix.lower(), "")


def read_file(
    path: Path,
    format: str,
    field: str,
    sample_by: str = "paragraph",
    separator: str | None = None,
    quoting: str | None = None,
) -> Iterator[Any]:
    """The values of `field` in a file of one of the `FORMATS`.

    sample_by: unit of a document in a plain text file, one of `SAMPLES`.
    separator, quoting: format of a csv or tsv file, see `csv_files.read_table`.

    Raises DataError for a record or table without the field, and the reader's own error for a file that does not have the
    format. A file without records yields nothing, even if it has no such field.
    """
    match format:
        case "parquet":
            yield from _read_parquet(path, field)
        case "arrow":
            yield from _read_arrow(path, field)
        case "text":
            with open_text(path, newline=None) as lines:
                for text in _read_text(lines, sample_by):
                    check_field(field, ["text"])
                    yield text
        case "jsonl":
            with open_text(path, newline="\n") as lines:
                yield from (_field_of_line(line, field) for line in lines)
        case "json":
            with open_text(path, newline="\n") as lines:
                yield from _read_json(lines, field)
        case "csv" | "tsv":
            separator = separator or ("\t" if format == "tsv" else ",")
            with open_text(path, newline="") as lines:
                yield from read_table(lines, field, separator, quoting or ("none" if format == "tsv" else None))


def read_hub(id: str, subset: str | None, split: str, revision: str | None, field: str) -> Iterator[Any]:
    """The values of `field` in one split of a dataset of the Hugging Face hub, streamed."""
    from datasets import load_dataset
    from datasets.utils.logging import CRITICAL, set_verbosity

    set_verbosity(CRITICAL)  # it also logs the errors that it raises
    dataset = load_dataset(id, subset, split=split, revision=revision, streaming=True)
    for table in dataset.with_format("arrow").iter(batch_size=ROWS):
        check_field(field, table.column_names)
        yield from _python_values(table[field])


def _read_text(lines: TextIO, sample_by: str) -> Iterator[str]:
    if sample_by == "line":
        yield from (line.removesuffix("\n") for line in lines)
    elif sample_by == "document":
        if text := lines.read():
            yield text
    else:
        paragraph: list[str] = []
        for line in lines:
            if line == "\n" and paragraph:
                if text := "".join(paragraph)[:-1]:
                    yield text
                paragraph = []
            else:
                paragraph.append(line)
        if paragraph:
            yield "".join(paragraph)


def _field_of_line(line: str, field: str) -> Any:
    line = line.removeprefix("\ufeff")  # concatenated files contain byte order marks between lines
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON ({error})") from error
    return _field_of(record, field)


def _field_of(record: Any, field: str) -> Any:
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}, not an object with fields")
    check_field(field, record)
    value = record[field]
    # Most strings are valid, and encoding a string is faster than a search for surrogates.
    return LONE_SURROGATE.sub(INVALID, value) if isinstance(value, str) and not _is_encodable(value) else value


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_json(lines: TextIO, field: str) -> Iterator[Any]:
    """The field of each JSON value of a file; values may span lines.

    A list is replaced by its elements, and a string in it by an object with the field only.
    """
    start = ""
    for line in lines:
        start += line
        if not line.isspace():
            break
    try:
        values = [json.loads(start)] if start.strip() else []
    except json.JSONDecodeError:
        values = _json_values(start + lines.read())
    for value in values:
        for element in value if isinstance(value, list) else [value]:
            yield _field_of({field: element} if isinstance(element, str) else element, field)
    yield from (_field_of_line(line, field) for line in lines if line.strip())


def _json_values(text: str) -> list[Any]:
    """All JSON values in a text."""
    values = []
    decoder = json.JSONDecoder()
    at = len(text) - len(text.lstrip())
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        values.append(value)
        while at < len(text) and text[at].isspace():
            at += 1
    return values


def _read_parquet(path: Path, field: str) -> Iterator[Any]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, page_checksum_verification=True) as file:
        if file.metadata.num_rows:
            check_field(field, file.schema_arrow.names)
            for batch in file.iter_batches(ROWS, columns=[field]):
                yield from _python_values(batch.column(field))


def _read_arrow(path: Path, field: str) -> Iterator[Any]:
    from pyarrow import ArrowInvalid, ipc

    with open(path, "rb") as file:
        try:
            stream = ipc.open_stream(file)
        except ArrowInvalid:
            table = ipc.open_file(file)
            batches: Iterable[Any] = map(table.get_batch, range(table.num_record_batches))
        else:
            _check_end_of_stream(path)
            batches = stream
        for batch in batches:
            if batch.num_rows:
                check_field(field, batch.schema.names)
                column = batch.column(field)
                _as_bytes(column).validate(full=True)
                for start in range(0, len(column), ROWS):
                    yield from _python_values(column.slice(start, ROWS))


def _check_end_of_stream(path: Path) -> None:
    """Raise EOFError for a stream without an end marker; Arrow accepts streams that are truncated between two batches."""
    with open(path, "rb") as file:
        start = file.read(len(ARROW_STREAM_START))
        file.seek(-len(ARROW_STREAM_END), 2)
        if start == ARROW_STREAM_START and file.read() != ARROW_STREAM_END:
            raise EOFError("the stream has no end marker: the file is truncated, or its writer was not closed")


def _as_bytes(column: Any) -> Any:
    """An Arrow column, strings as bytes because Arrow does not check that they are UTF-8; other columns unchanged."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode() if isinstance(column, pa.Array) else column.cast(column.type.value_type)
    for is_text, bytes_type in (
        (pa.types.is_string, pa.binary()),
        (pa.types.is_large_string, pa.large_binary()),
        (pa.types.is_string_view, pa.binary_view()),
    ):
        if is_text(column.type):
            return column.cast(bytes_type)
    return column


def _python_values(column: Any) -> list[Any]:
    """An Arrow column as Python values; INVALID replaces bytes that are not UTF-8."""
    content = _as_bytes(column)
    values = content.to_pylist()
    if content.type == column.type:
        return values
    return [value.decode(errors=MARK_INVALID) if isinstance(value, bytes) else value for value in values]
