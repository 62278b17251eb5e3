"""The text of a corpus as a stream of records in a fixed order.

    corpus = Corpus(CorpusConfig(path="data/demo/text/*.jsonl"))
    for record in corpus.records():
        record.text, record.fate, corpus.where(record.next)   # "...", "kept", "data/demo/text/bible.jsonl:1"
    corpus.records(start=record.next)                         # continues behind that record
    corpus.fingerprint()                                      # tells this corpus from another

Files are read one after the other and streaming, so neither memory nor a cache on disk bounds the corpus.
"""

import glob
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_prep.errors import DataError
from data_prep.readers import FORMATS, INVALID, check_compression, format_of, read_file, read_hub


@dataclass
class CorpusConfig:
    """One source of text: local files, or a dataset of the Hugging Face hub."""

    path: Any = field(default=None, metadata={"kind": str | list[str] | None})
    """Local text: a file, a folder, a glob, or a list of these as 'corpus.path=[a.jsonl,b/*.parquet]'. Read
    are txt, md, jsonl, json, csv, tsv, parquet and arrow files, also compressed (gz, bz2, xz, zst, lz4)."""
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
    """What a document is in a plain text file: line, paragraph (up to an empty line), document (the file)."""
    on_invalid_utf8: str = "error"
    """A record with bytes that are not UTF-8: error stops, replace puts U+FFFD per byte, skip drops it."""


class Position(NamedTuple):
    """A place in a corpus: so many files are behind it and so many records of the next one."""

    file: int
    record: int


START = Position(0, 0)

Fate = Literal["kept", "empty", "invalid_utf8_replaced", "invalid_utf8_skipped"]


class Record(NamedTuple):
    """One record of the corpus."""

    text: str
    """The document, empty unless it is to be tokenized."""
    next: Position
    """The place behind this record."""
    fate: Fate
    """What became of it."""


class Corpus:
    """A checked `CorpusConfig` and its files.

    Raises DataError, naming the option, if a path does not exist, holds no files that can be read, or an
    option has no such value.
    """

    def __init__(self, config: CorpusConfig) -> None:
        for option, value, allowed in (
            ("format", config.format or "text", FORMATS),
            ("sample_by", config.sample_by, ("line", "paragraph", "document")),
            ("on_invalid_utf8", config.on_invalid_utf8, ("error", "replace", "skip")),
        ):
            if value not in allowed:
                raise DataError(f"corpus.{option}={value}: must be one of {', '.join(allowed)}")
        if bool(config.path) == bool(config.hub):
            raise DataError(
                "give the corpus as 'corpus.path=data/demo/text/*.jsonl' (file, folder, glob or list) "
                "or as corpus.hub=ID (dataset of the Hugging Face hub)" + (", not both" if config.hub else "")
            )
        self.config = config
        self.files = [] if config.hub else _expand(config)
        self.name = config.name or (config.hub or _plain_name(config.path)).replace("/", "-")

    def records(self, start: Position = START) -> Iterator[Record]:
        """Every record from `start` on, in the one order this corpus has.

        Raises DataError that names file and record for unreadable files, missing text fields, texts that are
        no strings and, if `on_invalid_utf8` says so, invalid UTF-8.
        """
        for file in range(start.file, len(self.files) or 1):
            number = start.record if file == start.file else 0
            try:
                for value in itertools.islice(self._values(file), number, None):
                    record = self._record(value, Position(file, number + 1))
                    number += 1
                    yield record
            except DataError as error:
                raise DataError(f"{self._title(file)}, record {number + 1}: {error}") from error
            except Exception as error:  # each reader has errors of its own
                format = "a dataset" if self.config.hub else self._format(file)
                raise DataError(
                    f"{self._title(file)}, behind record {number}: cannot be read as {format} "
                    f"({type(error).__name__}: {error}). If it is of another format, set corpus.format"
                ) from error

    def where(self, position: Position) -> str:
        """The record just before `position` as file:number, numbers from 1."""
        return f"{self._title(position.file)}:{position.record}"

    def fingerprint(self) -> dict[str, Any]:
        """What tells this corpus from another: options that change the text, path, size and ends of files."""
        options = {key: value for key, value in vars(self.config).items() if key not in ("path", "name")}
        return options | {"files": [_file_fingerprint(path) for path in self.files]}

    def _values(self, file: int) -> Iterator[Any]:
        config = self.config
        if config.hub:
            return read_hub(config.hub, config.subset, config.split, config.revision, config.text_field)
        return read_file(self.files[file], self._format(file), config.text_field, config.sample_by)

    def _record(self, value: Any, position: Position) -> Record:
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"field {self.config.text_field!r} is a {type(value).__name__}, not text. "
                "Choose the text's field with corpus.text_field"
            )
        if not value or value.isspace():
            return Record("", position, "empty")
        if INVALID not in value:
            return Record(value, position, "kept")
        match self.config.on_invalid_utf8:
            case "replace":
                return Record(value.replace(INVALID, "\ufffd"), position, "invalid_utf8_replaced")
            case "skip":
                return Record("", position, "invalid_utf8_skipped")
        raise DataError(
            "not valid UTF-8. To go on, set corpus.on_invalid_utf8=replace or skip; the manifest counts such records"
        )

    def _title(self, file: int) -> str:
        return self.config.hub or str(self.files[file])

    def _format(self, file: int) -> str:
        return self.config.format or format_of(self.files[file])


def _expand(config: CorpusConfig) -> list[Path]:
    """The files of corpus.path: entries in the order given, the files of an entry sorted, each file once."""
    entries = config.path if isinstance(config.path, list | tuple) else [config.path]
    files: dict[Path, None] = {}
    for entry in map(str, entries):
        path = Path(entry)
        missing = "no such file, folder or glob match"
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and (config.format or format_of(p)))
            missing = f"no file in this folder has a suffix of {', '.join(FORMATS)}; set corpus.format"
        elif path.exists():
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(entry, recursive=True)) if p.is_file())
        if not found:
            raise DataError(f"corpus.path={entry}: {missing}")
        files |= dict.fromkeys(found)
    for file in files:
        if not (config.format or format_of(file)):
            raise DataError(f"{file}: its suffix tells no format; set corpus.format to one of {', '.join(FORMATS)}")
        check_compression(file)
    return list(files)


def _plain_name(path: Any) -> str:
    """wikipedia for data/wikipedia.jsonl.gz, text for data/text and for data/text/*.jsonl."""
    listed = isinstance(path, list | tuple)
    first = Path(str(path[0] if listed else path))
    whole = first.parent if listed or glob.has_magic(first.name) else first
    return whole.name.split(".")[0] or "corpus"


def _file_fingerprint(path: Path) -> dict[str, Any]:
    """Path, size, and sha256 of the first and the last MiB; hashing all would take too long."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        ends = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        ends += file.read()
    return {"path": str(path), "bytes": size, "sha256_of_ends": hashlib.sha256(ends).hexdigest()}
