"""The text of a corpus as a stream of records in a fixed order.

    corpus = Corpus(CorpusConfig(path="data/demo/text/*.jsonl"))
    for record in corpus.records():
        record.text, record.fate, corpus.where(record)      # "...", "kept", "data/demo/text/bible.jsonl:1"
    corpus.records(start=record.next)                       # continues behind that record
    corpus.fingerprint()                                    # tells this corpus from another

Files are read by `datasets`, one after the other and streaming, so neither memory nor a cache on disk bounds the
corpus. JSON lines are taken as lines of text and decoded here, because `datasets` wants one schema for all records
of a file, which the metadata of real corpora seldom has.
"""

import codecs
import glob
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_prep.errors import DataError

BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("text", {}),
    "jsonl": ("text", {"sample_by": "line"}),
    "json": ("json", {}),
    "csv": ("csv", {"sep": ","}),
    "tsv": ("csv", {"sep": "\t"}),
    "parquet": ("parquet", {}),
    "arrow": ("arrow", {}),
}
FORMATS = {".txt": "text", ".text": "text", ".md": "text", ".ndjson": "jsonl"} | {f".{b}": b for b in BUILDERS}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
POLICIES = ("error", "replace", "skip")

# Each undecodable byte becomes this pair of noncharacters, which no valid text interchanges, so that the record
# that holds it can be found whichever reader decoded the file.
INVALID = "\ufdd0\ufdef"


def _mark_invalid(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return INVALID * (error.end - error.start), error.end


codecs.register_error("data_prep_mark_invalid", _mark_invalid)


@dataclass
class CorpusConfig:
    """One source of text: local files, or a dataset of the Hugging Face hub."""

    path: Any = None
    """Local text: a file, a folder, a glob, or a list of these as 'corpus.path=[a.jsonl,b/*.parquet]'. Read are txt,
    jsonl, json, csv, tsv, parquet and arrow files, also compressed (gz, bz2, xz; zst and lz4 if Python has them)."""
    hub: str | None = None
    """Instead of corpus.path: id of a dataset on the Hugging Face hub, streamed."""
    subset: str | None = None
    """Configuration of the hub dataset, if it has several."""
    split: str = "train"
    """Split of the hub dataset."""
    revision: str | None = None
    """Commit of the hub dataset; pin it, since a run that continues must find the same records."""
    name: str | None = None
    """Name by which manifest and training report this source; null: the file's or folder's own name."""
    text_field: str = "text"
    """Field or column that holds a document's text."""
    format: str | None = None
    """text, jsonl, json, csv, tsv, parquet or arrow; null: by the file's suffix."""
    sample_by: str = "paragraph"
    """What a document is in a plain text file: line, paragraph (until an empty line) or document (whole file)."""
    on_invalid_utf8: str = "error"
    """A record with bytes that are not UTF-8: error stops, replace puts U+FFFD for each byte, skip drops the record."""


class Position(NamedTuple):
    """A place in a corpus: so many files are behind it and so many records of the next one."""

    file: int
    record: int


class Record(NamedTuple):
    """One record of the corpus."""

    text: str
    """The document, empty unless it is to be tokenized."""
    next: Position
    """The place behind this record."""
    fate: Literal["kept", "empty", "invalid_utf8_replaced", "invalid_utf8_skipped"]
    """What became of it."""


class Corpus:
    """A checked `CorpusConfig` and its files.

    Raises DataError, naming the option, if a path does not exist, holds no files that can be read, or an option has
    no such value.
    """

    def __init__(self, config: CorpusConfig) -> None:
        for option, value, allowed in (
            ("format", config.format, (None, *BUILDERS)),
            ("sample_by", config.sample_by, ("line", "paragraph", "document")),
            ("on_invalid_utf8", config.on_invalid_utf8, POLICIES),
        ):
            if value not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice)
                raise DataError(f"corpus.{option}={value}: must be one of {choices}")
        if bool(config.path) == bool(config.hub):
            raise DataError(
                "give the corpus as 'corpus.path=data/demo/text/*.jsonl' (file, folder, glob or list) "
                "or as corpus.hub=ID (dataset of the Hugging Face hub)" + (", not both" if config.hub else "")
            )
        self.config = config
        self.files = [] if config.hub else _expand(config)
        self.name = config.name or (config.hub or _plain_name(config.path)).replace("/", "-")

    def records(self, start: Position = Position(0, 0)) -> Iterator[Record]:
        """Every record from `start` on, in the one order this corpus has.

        Raises DataError that names file and record for unreadable files, missing text fields, texts that are no
        strings and, if `on_invalid_utf8` says so, invalid UTF-8.
        """
        for file in range(start.file, len(self.files) or 1):
            done = start.record if file == start.file else 0
            values = itertools.islice(self._values(file), done, None)
            number = done
            try:
                for number, value in enumerate(values, done + 1):
                    yield self._record(value, Position(file, number))
            except (DataError, GeneratorExit):
                raise
            except Exception as error:  # each reader has errors of its own
                raise DataError(
                    f"{self._title(file)}, after record {number}: cannot be read as {self._format(file)} "
                    f"({type(error).__name__}: {error}). If it is of another format, set corpus.format"
                ) from error

    def where(self, record: Record) -> str:
        """The record as file:number, numbers from 1."""
        return f"{self._title(record.next.file)}:{record.next.record}"

    def fingerprint(self) -> dict[str, Any]:
        """What tells this corpus from another: options that change the text, each file's path, size and ends."""
        options = {k: v for k, v in vars(self.config).items() if k not in ("path", "name")}
        return options | {"files": [_file_fingerprint(path) for path in self.files]}

    def size(self) -> int:
        """Bytes of all files as they lie on disk; 0 if unknown (hub)."""
        return sum(path.stat().st_size for path in self.files)

    def _values(self, file: int) -> Iterator[Any]:
        """The raw values of the text field; bytes where Arrow holds a string that is not UTF-8."""
        field = "text" if self._format(file) == "jsonl" else self.config.text_field
        for table in self._stream(file).with_format("arrow").iter(batch_size=1000):
            if field not in table.column_names:
                raise DataError(f"{self._title(file)}: {self._no_field(table.column_names)}")
            yield from _python_values(table[field])

    def _stream(self, file: int) -> Any:
        from datasets import load_dataset
        from datasets.utils.logging import CRITICAL, set_verbosity

        set_verbosity(CRITICAL)  # it logs what it raises; our message names file and record
        config = self.config
        if config.hub:
            return load_dataset(
                config.hub, config.subset, split=config.split, revision=config.revision, streaming=True
            )
        format = self._format(file)
        builder, options = BUILDERS[format]
        if format == "text":
            options = {"sample_by": config.sample_by}
        if builder == "csv":  # without these, a text "NA" would be missing and a text "007" the number 7
            options = options | {"keep_default_na": False, "converters": {config.text_field: str}}
        if builder in ("text", "csv", "json"):  # "utf-8" would make the json reader ignore encoding_errors
            options = options | {"encoding": "utf8", "encoding_errors": "data_prep_mark_invalid"}
        path = glob.escape(str(self.files[file]))
        return load_dataset(builder, data_files=[path], split="train", streaming=True, **options)

    def _record(self, value: Any, position: Position) -> Record:
        record = Record("", position, "empty")
        if self._format(position.file) == "jsonl" and value.strip():
            value = self._field_of_line(value, record)
        if isinstance(value, bytes):
            value = value.decode("utf-8", errors="data_prep_mark_invalid")
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{self.where(record)}: field {self.config.text_field!r} is a {type(value).__name__}, not text. "
                "Choose the text's field with corpus.text_field"
            )
        if not value or not value.strip():
            return record
        if INVALID not in value:
            return Record(value, position, "kept")
        match self.config.on_invalid_utf8:
            case "replace":
                return Record(value.replace(INVALID, "\ufffd"), position, "invalid_utf8_replaced")
            case "skip":
                return Record("", position, "invalid_utf8_skipped")
        raise DataError(
            f"{self.where(record)}: not valid UTF-8. To go on, set corpus.on_invalid_utf8=replace or skip; "
            "the manifest counts such records"
        )

    def _field_of_line(self, line: str, record: Record) -> Any:
        try:
            fields = json.loads(line.removeprefix("\ufeff"))
        except json.JSONDecodeError as error:
            raise DataError(f"{self.where(record)}: not a line of JSON ({error})") from error
        if not isinstance(fields, dict):
            raise DataError(f"{self.where(record)}: a JSON {type(fields).__name__}, not an object with fields")
        if self.config.text_field not in fields:
            raise DataError(f"{self.where(record)}: {self._no_field(fields)}")
        return fields[self.config.text_field]

    def _no_field(self, existing: Any) -> str:
        names = ", ".join(map(str, existing)) or "none"
        return f"no field {self.config.text_field!r} (corpus.text_field); fields that exist: {names}"

    def _title(self, file: int) -> str:
        return self.config.hub or str(self.files[file])

    def _format(self, file: int) -> str:
        return "hub" if self.config.hub else self.config.format or format_of(self.files[file])


def format_of(path: Path) -> str:
    """The format that a file's suffix tells, a compression's suffix aside; "" if it tells none."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return FORMATS.get(name.suffix.lower(), "")


def _expand(config: CorpusConfig) -> list[Path]:
    """The files of corpus.path: entries in the order given, the files of an entry sorted, each file once."""
    entries = config.path if isinstance(config.path, list | tuple) else [config.path]
    files: dict[Path, None] = {}
    for entry in entries:
        path = Path(str(entry))
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and (config.format or format_of(p)))
        elif path.exists():
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(str(entry), recursive=True)) if p.is_file())
        if not found:
            what = "no file in this folder can be read" if path.is_dir() else "no such file, folder or glob match"
            raise DataError(f"corpus.path={entry}: {what}")
        files |= dict.fromkeys(found)
    for file in files:
        if not (config.format or format_of(file)):
            raise DataError(f"{file}: cannot tell the format by the suffix; set corpus.format to one of {[*BUILDERS]}")
    return list(files)


def _plain_name(path: Any) -> str:
    """wikipedia for data/wikipedia.jsonl.gz, text for data/text and for data/text/*.jsonl."""
    first = Path(str(path[0] if isinstance(path, list | tuple) else path))
    whole = first.parent if glob.has_magic(first.name) or isinstance(path, list | tuple) else first
    return whole.name.split(".")[0] or "corpus"


def _file_fingerprint(path: Path) -> dict[str, Any]:
    """Path, size, and sha256 of the first and the last MiB: hashing all of a large corpus would take as long as it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        ends = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        ends += file.read()
    return {"path": str(path), "bytes": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}


def _python_values(column: Any) -> list[Any]:
    """An Arrow column as Python values, strings that are not UTF-8 as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = "large_binary" if str(column.type).startswith("large") else "binary"
        return column.cast(binary).to_pylist()
