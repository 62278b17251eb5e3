"""The values of one field of one file, or of one dataset of the hub, record by record.

    for value in read_file(Path("corpus.parquet"), "parquet", field="text"):
        value        # str, None, whatever else the record holds there; INVALID where bytes were not UTF-8

`datasets` reads every format but JSON lines, streaming. Those are plain lines to `fsspec`, which is under
`datasets` too: its json reader wants one schema for all records, which the metadata of real corpora seldom
has.
"""

import codecs
import glob
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import DataError

FORMATS = ("text", "jsonl", "json", "csv", "tsv", "parquet", "arrow")
SUFFIXES = {".txt": "text", ".md": "text", ".ndjson": "jsonl"} | {f".{name}": name for name in FORMATS}
COMPRESSIONS = ("gz", "bz2", "xz", "zst", "lz4")

# Each undecodable byte becomes this pair of noncharacters, which no valid text interchanges, so that the
# record that holds it can be found whichever reader decoded the file.
INVALID = "\ufdd0\ufdef"
MARK_INVALID = "data_prep_mark_invalid"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""JSON can spell half of a surrogate pair, which no UTF-8 can; whole pairs are one character by then."""


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return INVALID * (error.end - error.start), error.end


codecs.register_error(MARK_INVALID, _mark_invalid)


def format_of(path: Path) -> str:
    """The format that a file's suffix tells, a compression's suffix aside; "" if it tells none."""
    name = path.with_suffix("") if path.suffix[1:] in COMPRESSIONS else path
    return SUFFIXES.get(name.suffix.lower(), "")


def check_compression(path: Path) -> None:
    """Raise DataError if `path` is compressed in a way that needs a package which is not installed."""
    from fsspec.utils import compressions  # type: ignore[import-untyped]

    suffix = path.suffix[1:]
    if suffix in COMPRESSIONS and suffix not in compressions:
        package = {"zst": "zstandard", "lz4": "lz4"}[suffix]
        raise DataError(f"{path}: reading .{suffix} files needs the Python package {package}: pip install {package}")


def read_file(path: Path, format: str, field: str, sample_by: str = "paragraph") -> Iterator[Any]:
    """The values of `field` in a file of one of the `FORMATS`; `sample_by` cuts plain text into documents.

    Raises DataError for a record or table without the field, and whatever the format's reader raises for a
    file that is not of the format.
    """
    if format == "jsonl":
        return _read_lines(path, field)
    options: dict[str, Any] = {}
    if format == "text":
        options = {"sample_by": sample_by}
    if format in ("csv", "tsv"):  # otherwise a text "NA" would be missing and a text "007" the number 7
        options = {
            "keep_default_na": False,
            "converters": {field: str},
            "sep": "\t" if format == "tsv" else ",",
        }
    if format in ("text", "csv", "tsv", "json"):  # "utf-8" would make the json reader ignore encoding_errors
        options |= {"encoding": "utf8", "encoding_errors": MARK_INVALID}
    builder = "csv" if format == "tsv" else format
    return _read_dataset(field, builder, data_files=[glob.escape(str(path))], split="train", **options)


def read_hub(id: str, subset: str | None, split: str, revision: str | None, field: str) -> Iterator[Any]:
    """The values of `field` in one split of a dataset of the Hugging Face hub, streamed."""
    return _read_dataset(field, id, subset, split=split, revision=revision)


def _read_lines(path: Path, field: str) -> Iterator[Any]:
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(str(path), "rb", compression="infer") as lines:
        for line in lines:
            text = line.decode("utf-8", errors=MARK_INVALID).removeprefix("\ufeff")
            yield None if text.isspace() else _field_of(text, field)


def _field_of(line: str, field: str) -> Any:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not a line of JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}, not an object with fields")
    _check_field(field, record)
    value = record[field]
    if isinstance(value, str) and ("\\ud" in line or "\\uD" in line):
        value = LONE_SURROGATE.sub(INVALID, value)
    return value


def _read_dataset(field: str, *arguments: Any, **options: Any) -> Iterator[Any]:
    from datasets import load_dataset
    from datasets.utils.logging import CRITICAL, set_verbosity

    set_verbosity(CRITICAL)  # it logs what it raises; our message names file and record
    dataset = load_dataset(*arguments, streaming=True, **options)
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        _check_field(field, table.column_names)
        yield from _python_values(table[field])


def _check_field(field: str, existing: Iterable[str]) -> None:
    if field not in existing:
        names = ", ".join(existing) or "none"
        raise DataError(f"no field {field!r} (corpus.text_field); fields that exist: {names}")


def _python_values(column: Any) -> list[Any]:
    """An Arrow column as Python values; its strings may hold bytes that are not UTF-8, unchecked by Arrow."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast("large_binary").to_pylist()
        return [value if value is None else value.decode("utf-8", errors=MARK_INVALID) for value in values]
