"""Records the finished part of a tokenization in progress.json of its folder, until manifest.json replaces it.

journal = Journal.open(folder, settings, vocab_size)    # a new journal, or that of the run to continue
corpus.records(journal.position)
journal.add_group(shards, position, fates, unigrams)    # these shards are kept if the process is killed
journal.close()
"""

import json
import re
import reprlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corpora import Position
from data_prep.errors import DataError
from data_prep.json_fields import field_problems, is_of
from data_prep.shards import MANIFEST_NAME, TOKENIZER_NAME, Shard, publish_json, shard_problems, size_problems
from mone_common.files import TEMPORARY_PREFIX

JOURNAL_NAME = "progress.json"
SHARD_FILE = r"(train|validation)-\d{5,}\.(bin|idx)"
OWN_FILE = re.compile(
    rf"{SHARD_FILE}|{re.escape(TEMPORARY_PREFIX)}"
    rf"({SHARD_FILE}|{re.escape(JOURNAL_NAME)}|{re.escape(MANIFEST_NAME)}|{TOKENIZER_NAME})"
)
"""Names of files that an unfinished run may leave. Other files in its folder belong to the user."""
STORED_TYPES: dict[str, type | None] = {"folder": None, "unigrams": list, "position": list, "records": dict, "shards": list}


@dataclass
class Journal:
    """Finished groups of documents and the position after them."""

    folder: Path
    """Output folder of the tokenization."""
    settings: dict[str, Any]
    """Settings that determine the output; a run with other settings must not continue it."""
    unigrams: np.ndarray
    """[vocab_size] int64, occurrences of each token in the finished training shards."""
    position: Position = Position(0, 0)
    """Position in the corpus after the finished groups."""
    groups: int = 0
    """Number of finished groups; also the number in the names of the next shards."""
    round_trip: bool = True
    """See `Manifest.round_trip`."""
    records: Counter[str] = field(default_factory=Counter)
    """Records by fate."""
    shards: list[Shard] = field(default_factory=list)
    """Finished shards."""

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], vocab_size: int) -> "Journal":
        """The journal in `folder`, or a new one; removes the files of unfinished groups.

        Raises DataError if the folder contains shards of other settings, shards without a journal, or damaged shards.
        """
        journal = cls(folder, settings, np.zeros(vocab_size, np.int64))
        files = {path for pattern in ("*.bin", "*.idx") for path in folder.glob(pattern)}
        if (folder / JOURNAL_NAME).is_file():
            earlier = cls._load(folder)
            if earlier.shards:
                refuse_other_settings(folder, earlier.settings, settings)
                if len(earlier.unigrams) != vocab_size:
                    raise DataError(
                        f"{folder / JOURNAL_NAME}: damaged (counts of {len(earlier.unigrams)} tokens, the tokenizer has "
                        f"{vocab_size}). Remove the folder and start again"
                    )
                journal = earlier
        elif files:
            raise DataError(
                f"output={folder}: contains {len(files)} shard files but neither {JOURNAL_NAME} nor a manifest, "
                "so they do not belong to an unfinished run. Choose another folder"
            )
        if problems := size_problems(folder, journal.shards):
            raise DataError(f"output={folder}: {'; '.join(problems)}. Remove the folder and start again")
        finished = {folder / file for shard in journal.shards for file, _, _ in shard.files()}
        for path in {path for path in folder.iterdir() if OWN_FILE.fullmatch(path.name)} - finished:
            if not path.is_dir() or path.is_symlink():
                path.unlink()
            elif path.name.startswith(TEMPORARY_PREFIX):
                shutil.rmtree(path)
        journal._save()
        return journal

    def add_group(self, shards: Iterable[Shard], position: Position, fates: Counter[str], unigrams: np.ndarray) -> None:
        """Record a finished group: published shards, the position after it, records by fate, token counts."""
        before = len(self.shards)
        self.shards += shards
        self.position = position
        self.records += fates
        self.unigrams = self.unigrams + unigrams
        self.groups += len(self.shards) > before  # the corpus may end with records that give no document
        self._save()

    def close(self) -> None:
        """Remove the journal; call it after the manifest is published."""
        (self.folder / JOURNAL_NAME).unlink()

    def _save(self) -> None:
        content = {k: v for k, v in vars(self).items() if k != "folder"}
        content |= {"unigrams": self.unigrams.tolist(), "shards": [asdict(shard) for shard in self.shards]}
        publish_json(self.folder / JOURNAL_NAME, content)

    @classmethod
    def _load(cls, folder: Path) -> "Journal":
        path = folder / JOURNAL_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if problems := list(field_problems(cls, content, STORED_TYPES)):
                raise ValueError("; ".join(problems))
            content["unigrams"] = np.array(content["unigrams"])
            content["position"] = Position(*content["position"])
            content["records"] = Counter(content["records"])
            if problems := list(shard_problems(content["shards"])):
                raise ValueError("; ".join(problems))
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            journal = cls(folder=folder, **content)
            if problems := list(journal._problems()):
                raise ValueError("; ".join(problems))
            return journal
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DataError(f"{path}: damaged ({error}). Remove the folder and start again") from error

    def _problems(self) -> Iterator[str]:
        """Contradictions between the fields, one sentence each."""
        names = {shard.name: shard.split for shard in self.shards}
        numbers = {int(name.rpartition("-")[2]) for name in names if re.fullmatch(r"\w+-\d{5,18}", name)}
        if numbers != set(range(len(numbers))) or any(
            name not in {f"{split}-{number:05}" for number in numbers} for name, split in names.items()
        ):
            yield "the numbers in the names of the shards are not consecutive"
        if self.groups != len(numbers):
            yield f"groups is {self.groups}, the shards belong to {len(numbers)}"
        if not (self.unigrams.ndim == 1 and self.unigrams.dtype.kind == "i" and (self.unigrams >= 0).all()):
            yield "unigrams is not a list of counts"
        elif self.unigrams.sum() != (tokens := sum(shard.tokens for shard in self.shards if shard.split == "train")):
            yield f"unigrams counts {self.unigrams.sum()} tokens, the training shards have {tokens}"
        if not all(is_of(count, int) and count >= 0 for count in self.records.values()):
            yield "records is not an object of counts"
            return
        kept = self.records["kept"] + self.records["invalid_utf8_replaced"]
        if kept != (documents := sum(shard.documents for shard in self.shards)):
            yield f"records counts {kept} documents, the shards have {documents}"
        file, record = self.position
        files = len(self.settings["corpus"]["files"]) or 1  # a dataset of the hub counts as one
        total = sum(self.records.values())
        if not all(is_of(number, int) and number >= 0 for number in self.position) or file >= files:
            yield f"position is {reprlib.repr(list(self.position))}, must be a file below {files} and a record"
        elif record > total or (file == 0 and record != total):
            yield f"position is after record {record} of file {file}, records counts {total}"


def refuse_other_settings(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise DataError if the shards in `folder` have other settings than this run; it names the differences."""
    was, is_now = dict(_flat(there)), dict(_flat(now))
    different = [key for key in {**was, **is_now} if was.get(key) != is_now.get(key)]
    if different:
        changes = "; ".join(f"{key} was {was.get(key)!r}, is now {is_now.get(key)!r}" for key in different[:5])
        raise DataError(
            f"output={folder}: contains shards of another corpus, tokenizer or setting ({changes}). "
            "Choose another folder, or remove this one"
        )


def _flat(settings: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves of nested settings, each with its dotted name."""
    if isinstance(settings, dict | list):
        pairs = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for key, value in pairs:
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, settings
