"""Reads the text of a corpus as a stream of records in a fixed order.

    corpus = Corpus(CorpusConfig(path="data/demo/text/*.jsonl"))
    for record in corpus.records():
        record.text, record.fate, corpus.where(record.next)   # "...", "kept", "data/demo/text/bible.jsonl:1"
    corpus.records(start=record.next)                         # continues after that record
    corpus.fingerprint()                                      # identifies the corpus

Files are streamed one after the other, so neither memory nor disk space limits the size of the corpus.
"""

import glob
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from data_prep.corpus_files import find_files, fingerprint_of, state_of, would_find
from data_prep.csv_files import QUOTINGS
from data_prep.errors import DataError
from data_prep.progress import counted
from data_prep.readers import FORMATS, SAMPLES, format_of, read_file, read_hub
from data_prep.text_files import INVALID, compression_of


@dataclass
class CorpusConfig:
    """One source of text: local files, or a dataset of the Hugging Face hub."""

    path: Any = field(default=None, metadata={"kind": str | list[str] | None})
    """Local text: a file, a folder, a glob, or a list of these as 'corpus.path=[a.jsonl,b/*.parquet]'. Formats: txt, md,
    jsonl, json, csv, tsv, parquet, arrow; text formats may be compressed (gz, bz2, xz, zst, lz4)."""
    hub: str | None = None
    """Instead of corpus.path: id of a dataset on the Hugging Face hub, streamed."""
    subset: str | None = None
    """Configuration of the hub dataset, if it has several."""
    split: str = "train"
    """Split of the hub dataset."""
    revision: str | None = None
    """Commit of the hub dataset; pin it, so that a run that continues reads the same records."""
    name: str | None = None
    """Name of this source in the manifest and in training; null: the name of the file or folder."""
    text_field: str = "text"
    """Field or column with a document's text."""
    format: str | None = None
    """text, jsonl, json, csv, tsv, parquet or arrow; null: by the file's suffix."""
    sample_by: str = "paragraph"
    """Unit of a document in a plain text file: line, paragraph (ends at an empty line) or document (the whole file)."""
    separator: str | None = None
    """Separator of the cells of a csv or tsv file; null: a comma in csv, a tab in tsv."""
    quoting: str | None = None
    """Quoting in csv and tsv files: minimal (quotes may enclose cells) or none (a quote is an ordinary character).
    null: none in tsv; minimal in csv, but quoted cells that look like several rows are an error."""
    on_invalid_utf8: str = "error"
    """Action for a record with bytes that are not UTF-8: error stops, replace writes U+FFFD per byte, skip drops it."""


class Position(NamedTuple):
    """A position in a corpus: `file` files before it, and `record` records of the next file."""

    file: int
    record: int


START = Position(0, 0)
CHANGED = (
    "while it was read. Run again when nothing writes to the corpus any more, with an output folder without shards: "
    "finished shards may contain text that differs from the files"
)
T = TypeVar("T")

Fate = Literal["kept", "empty", "invalid_utf8_replaced", "invalid_utf8_skipped"]


class Record(NamedTuple):
    """One record of the corpus."""

    text: str
    """The document; empty if it is not tokenized."""
    next: Position
    """The position after this record."""
    fate: Fate
    """How the record was handled."""


class Corpus:
    """A checked `CorpusConfig` and its files.

    Raises DataError, naming the option, if a path does not exist or has no readable files, or an option has an invalid
    value.
    """

    def __init__(self, config: CorpusConfig) -> None:
        for option, value, allowed in (
            ("format", config.format or "text", FORMATS),
            ("sample_by", config.sample_by, SAMPLES),
            ("quoting", config.quoting or "none", QUOTINGS),
            ("on_invalid_utf8", config.on_invalid_utf8, ("error", "replace", "skip")),
        ):
            if value not in allowed:
                raise DataError(f"corpus.{option}={value}: must be one of {', '.join(allowed)}")
        if bool(config.path) == bool(config.hub):
            raise DataError(
                "give the corpus as 'corpus.path=data/demo/text/*.jsonl' (file, folder, glob or list) "
                "or as corpus.hub=ID (dataset of the Hugging Face hub)" + (", not both" if config.hub else "")
            )
        if config.separator is not None and (len(config.separator) != 1 or config.separator in '"\r\n'):
            raise DataError(f"corpus.separator={config.separator!r}: must be one character, not a quote or a line break")
        self.config = config
        self.files, self._left_out = ([], {}) if config.hub else find_files(config.path, config.format)
        self._states = [state_of(path) for path in self.files]
        self.sizes = [state.bytes for state in self._states]
        self._fingerprints: list[dict[str, Any]] = []
        self.name = config.name or (config.hub or _plain_name(config.path)).replace("/", "-")

    def records(self, start: Position = START) -> Iterator[Record]:
        """All records from `start` on, in the fixed order of the corpus.

        Raises DataError, naming file and record, for unreadable files, missing text fields, texts that are not strings,
        invalid UTF-8 with on_invalid_utf8=error, and files that change while they are read.
        """
        for file in range(start.file, len(self.files) or 1):
            number = start.record if file == start.file else 0
            self._refuse_a_changed_file(file)
            try:
                values = self._values(file)
                if (skipped := sum(1 for _ in itertools.islice(values, number))) < number:
                    raise DataError(
                        f"cannot continue here, because the file has only {skipped} records. The corpus has changed, or "
                        "progress.json in the output folder is damaged. Remove that folder and start again"
                    )
                for value in values:
                    record = self._record(value, Position(file, number + 1))
                    number += 1
                    yield record
            except DataError as error:
                self._refuse_a_changed_file(file)
                raise DataError(f"{self._title(file)}, record {number + 1}: {error}") from error
            except Exception as error:  # the readers raise different types of errors
                self._refuse_a_changed_file(file)
                format = "a dataset" if self.config.hub else self._format(file)
                may_be_another = not (self.config.hub or isinstance(error, EOFError) or not self.sizes[file])
                hint = ". If it has another format, set corpus.format" if may_be_another else ""
                raise DataError(
                    f"{self._title(file)}, after record {number}: cannot be read as {format} "
                    f"({type(error).__name__}: {error}){hint}"
                ) from error
            self._refuse_a_changed_file(file)
        self.refuse_changes()
        self._refuse_other_ends()

    def where(self, position: Position) -> str:
        """The record before `position` as file:number, numbers from 1."""
        return f"{self._title(position.file)}:{position.record}"

    def describe(self) -> str:
        """One line: number, formats and size of the files, and the files of folders that are left out."""
        if self.config.hub:
            return f"{self.name}: split {self.config.split} of a dataset of the Hugging Face hub"
        kinds = Counter(self._kind(file) for file in range(len(self.files)))
        formats = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        line = f"{self.name}: {_count(len(self.files))} ({formats}), {_size(sum(self.sizes))}"
        for reason, count in sorted(Counter(self._left_out.values()).items()):
            names = [path.name for path, why in self._left_out.items() if why == reason][:3]
            line += f"; left out {_count(count)} ({reason}): {', '.join(names)}{', ...' if count > len(names) else ''}"
        return line

    def fingerprint(self, progress_seconds: float = 5.0) -> dict[str, Any]:
        """Identifies the corpus: the options that change the text; path, size and hash of both ends of each file.

        Raises DataError for files that changed since this object was created.
        """
        options = {key: value for key, value in vars(self.config).items() if key not in ("path", "name")}
        paths = counted(self.files, f"{self.name}: ends of files hashed", progress_seconds)
        self._fingerprints = [self._of_file(file, fingerprint_of) for file, _ in enumerate(paths)]
        for file in range(len(self.files)):
            self._refuse_a_changed_file(file)
        return options | {"files": self._fingerprints}

    def refuse_to_hold(self, files: Iterable[Path], option: str) -> None:
        """Raise DataError if one of `files`, which `option` will write, would become part of the corpus."""
        for file in [] if self.config.hub else files:
            if would_find(self.config.path, self.config.format, file):
                raise DataError(
                    f"{option} is in the corpus: {file} would be one of its files. Choose a folder outside corpus.path="
                    f"{self.config.path}"
                )

    def refuse_changes(self) -> None:
        """Raise DataError if a file was changed, added or removed since this object was created."""
        if self.config.hub:
            return
        files = set(find_files(self.config.path, self.config.format).files)
        for path in sorted(files ^ set(self.files)):
            raise DataError(f"{path}: {'added to' if path in files else 'removed from'} the corpus {CHANGED}")
        for file in range(len(self.files)):
            self._refuse_a_changed_file(file)

    def _refuse_other_ends(self) -> None:
        """Raise DataError if the ends of a file differ from the fingerprint; modification times can be set by users."""
        paths = counted(self._fingerprints, f"{self.name}: ends of files compared", 5.0)
        for file, earlier in enumerate(paths):
            if self._of_file(file, fingerprint_of) != earlier:
                raise DataError(f"{self.files[file]}: changed (different content) {CHANGED}")

    def _refuse_a_changed_file(self, file: int) -> None:
        if self.config.hub:
            return
        before, state = self._states[file], self._of_file(file, state_of)
        if state != before:
            how = f"{before.bytes} bytes at the start, {state.bytes} now"
            if state.bytes == before.bytes:
                how = "written to or replaced"
            raise DataError(f"{self.files[file]}: changed ({how}) {CHANGED}")

    def _of_file(self, file: int, function: Callable[[Path], T]) -> T:
        try:
            return function(self.files[file])
        except FileNotFoundError as error:
            raise DataError(f"{self.files[file]}: removed {CHANGED}") from error
        except OSError as error:
            raise DataError(f"{self.files[file]}: cannot be read ({error.strerror})") from error

    def _values(self, file: int) -> Iterator[Any]:
        config = self.config
        if config.hub:
            return read_hub(config.hub, config.subset, config.split, config.revision, config.text_field)
        return read_file(
            self.files[file], self._format(file), config.text_field, config.sample_by, config.separator, config.quoting
        )

    def _record(self, value: Any, position: Position) -> Record:
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"field {self.config.text_field!r} is a {type(value).__name__}, not text. "
                "Set corpus.text_field to the field with the text"
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
            "not valid UTF-8. To continue, set corpus.on_invalid_utf8=replace or skip; the manifest counts such records"
        )

    def _title(self, file: int) -> str:
        return self.config.hub or str(self.files[file])

    def _format(self, file: int) -> str:
        return self.config.format or format_of(self.files[file])

    def _kind(self, file: int) -> str:
        compression = compression_of(self.files[file])
        return f"{self._format(file)}.{compression}" if compression else self._format(file)


def _count(files: int) -> str:
    return "1 file" if files == 1 else f"{files:,} files"


def _size(count: int) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def _plain_name(path: Any) -> str:
    """wikipedia for data/wikipedia.jsonl.gz, text for data/text and for data/text/*.jsonl."""
    listed = isinstance(path, list | tuple)
    first = Path(str(path[0] if listed else path))
    whole = first.parent if listed or glob.has_magic(first.name) else first
    return whole.name.split(".")[0] or "corpus"
