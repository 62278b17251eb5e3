"""Tokenizes a corpus into token shards with several processes; an interrupted run can continue.

    mone-tokenize corpus.path=wikipedia.jsonl tokenizer=data/demo/tokenizer output=data/wikipedia
    -> train-00000.bin/.idx, validation-00000.bin/.idx, ..., tokenizer/, manifest.json
    killed and run again: finished shards are kept, and the output equals that of an uninterrupted run
    load_manifest("data/wikipedia").tokens("train")

Documents keep the order of the corpus. They are collected until a group has `shard_tokens` tokens. Each group becomes one
train shard and one validation shard, independent of the number of workers, and is then recorded in progress.json.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.corpora import Corpus, CorpusConfig, Position
from data_prep.encoding import EncoderPool
from data_prep.errors import DataError, naming_folder
from data_prep.journal import JOURNAL_NAME, Journal, refuse_other_settings
from data_prep.progress import Progress
from data_prep.shards import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardWriter,
    Split,
    count_tokens,
    dtype_of,
    entropy,
    load_manifest,
    megatron_indexed_dataset,
)
from data_prep.tokenizer import Tokenizer, load_tokenizer
from mone_common.console import command, to_dataclass
from mone_common.files import writing_folder
from mone_common.locks import LOCK_FILE, lock

logger = logging.getLogger(__name__)

ROUND_TRIP_FIRST, ROUND_TRIP_EVERY = 32, 100
"""The first documents of each group and every n-th of the others are decoded and compared with their text."""


@dataclass
class TokenizeConfig:
    """Options of `mone-tokenize`."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: str = MISSING
    """A folder of mone-train-tokenizer, a sentencepiece .model file, a Hugging Face tokenizer folder, or a hub id such as
    EleutherAI/gpt-neox-20b. It is copied to the output folder, and training uses the copy."""
    output: str = MISSING
    """Folder for the shards, one folder per corpus; training can blend several."""
    validation_fraction: float = 0.01
    """Share of documents that are held out for validation, chosen by a hash of their text."""
    shard_tokens: int = 100_000_000
    """Tokens of a group of documents, which becomes a shard; after a crash, at most one group is repeated."""
    workers: int = 1
    """Encoding processes; the output does not depend on their number."""
    progress_seconds: float = 5.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"validation_fraction={self.validation_fraction}: must be at least 0 and below 1")
        for option in ("shard_tokens", "workers"):
            if getattr(self, option) < 1:
                raise DataError(f"{option}={getattr(self, option)}: must be at least 1")


ConfigStore.instance().store(name="tokenize_schema", node=TokenizeConfig)


class Group:
    """The documents of one train and one validation shard, and counts of their records."""

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self._folder, self._number, self._dtype = folder, number, dtype
        self._writers: dict[Split, ShardWriter] = {}
        self.fates: Counter[str] = Counter()
        self.records = self.documents = self.tokens = 0

    def add(self, tokens: np.ndarray, split: Split) -> None:
        """Append a document: tokens [length], including the end-of-document token."""
        if split not in self._writers:
            self._writers[split] = ShardWriter(self._folder, f"{split}-{self._number:05}", split, self._dtype)
        self._writers[split].add(tokens)
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self, journal: Journal, corpus: Corpus, position: Position) -> None:
        """Publish the shards, then record the group in the journal; position: end of the group."""
        source = f"{corpus.where(journal.position)} - {corpus.where(position)}"
        shards = [self._writers[split].finish(source) for split in sorted(self._writers)]
        unigrams = np.zeros_like(journal.unigrams)
        for shard in shards:
            if shard.split == "train":
                unigrams += count_tokens(self._folder / f"{shard.name}.bin", self._dtype, len(unigrams))
        journal.add_group(shards, position, self.fates, unigrams)


def write_groups(config: TokenizeConfig, corpus: Corpus, tokenizer: Tokenizer, pool: EncoderPool, journal: Journal) -> None:
    """Write every group from the journal's position to the end of the corpus.

    A thread writes a full group to disk while the next one is collected, so that the workers do not wait for the disk.
    """
    megatron_indexed_dataset()  # the import takes seconds, which must not count in the progress
    dtype = dtype_of(tokenizer.vocab_size)
    number, position = journal.groups, journal.position
    group = Group(journal.folder, number, dtype)
    progress = Progress(corpus, config.progress_seconds, position)
    with ThreadPoolExecutor(1) as thread:
        finishing: Future[None] | None = None
        for records, encoded in pool.encode(progress.watch(corpus.records(position))):
            for record, tokens, validation in zip(records, encoded.documents(), encoded.validation, strict=True):
                position = record.next
                group.fates[record.fate] += 1
                group.records += 1
                if not record.text:
                    continue
                if group.documents < ROUND_TRIP_FIRST or group.documents % ROUND_TRIP_EVERY == 0:
                    journal.round_trip &= tokenizer.decode(tokens[:-1].tolist()) == record.text
                group.add(tokens, "validation" if validation else "train")
                if group.tokens >= config.shard_tokens:
                    if finishing:
                        finishing.result()
                    finishing = thread.submit(group.finish, journal, corpus, position)
                    number += 1
                    group = Group(journal.folder, number, dtype)
            progress.add(len(encoded.tokens))
        if finishing:
            finishing.result()
        if group.records:
            group.finish(journal, corpus, position)
    progress.close()


def publish_manifest(name: str, tokenizer: Tokenizer, journal: Journal) -> Manifest:
    """Publish manifest.json and remove the journal; DataError if there are no training documents."""
    if not journal.unigrams.any():
        fates = ", ".join(f"{count} {fate}" for fate, count in sorted(journal.records.items()))
        raise DataError(
            f"{name}: no document for training (records: {fates or 'no record at all'}). The corpus is empty or too small"
        )
    manifest = Manifest(
        folder=journal.folder,
        name=name,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        dtype=dtype_of(tokenizer.vocab_size),
        tokenizer_sha256=tokenizer.sha256,
        round_trip=journal.round_trip,
        unigram_entropy=entropy(journal.unigrams),
        records=dict(sorted(journal.records.items())),
        settings=journal.settings,
        shards=tuple(journal.shards),
    )
    manifest.save()
    journal.close()
    return manifest


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; the kernel releases the lock when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, "w") as file:
        if not lock(file):
            raise DataError(f"output={folder}: another mone-tokenize is writing to it")
        yield


def tokenize(config: TokenizeConfig) -> Manifest:
    """Tokenize the corpus into `config.output`, or continue an unfinished run; return the manifest.

    Raises DataError for invalid input, an output folder with other contents, and a full disk.
    """
    corpus, tokenizer, output = Corpus(config.corpus), load_tokenizer(config.tokenizer), Path(config.output)
    names = [JOURNAL_NAME, MANIFEST_NAME, "train-00000.bin", "train-00000.idx"]
    names += [f"{TOKENIZER_NAME}/{name}" for name in tokenizer.file_names()]
    corpus.refuse_to_hold([output / name for name in names], f"output={output}")
    logger.info(corpus.describe())
    settings = {
        "corpus": corpus.fingerprint(config.progress_seconds) | {"name": corpus.name},
        "tokenizer_sha256": tokenizer.sha256,
        "validation_fraction": config.validation_fraction,
        "shard_tokens": config.shard_tokens,
    }
    if manifest := finished(output, settings):
        return manifest
    with naming_folder("output", output), locked(output):
        if manifest := finished(output, settings):
            return manifest
        # This comes before Journal.open, which creates the journal that marks an earlier attempt.
        has_copy = has_tokenizer(tokenizer, config.tokenizer, output / TOKENIZER_NAME)
        journal = Journal.open(output, settings, tokenizer.vocab_size)
        if not has_copy:
            copy_tokenizer(tokenizer, output / TOKENIZER_NAME)
        corpus.refuse_changes()  # fails now, rather than at the end, if a link in the corpus leads to the output
        with EncoderPool(str(output / TOKENIZER_NAME), config.validation_fraction, config.workers) as pool:
            write_groups(config, corpus, tokenizer, pool, journal)
        return publish_manifest(corpus.name, tokenizer, journal)


def has_tokenizer(tokenizer: Tokenizer, given: str, folder: Path) -> bool:
    """Whether to keep `folder`: the tokenizer was loaded from it, or the user has put the same tokenizer there.

    Raises DataError if the folder contains something else and no earlier attempt has written it.
    """
    is_source = folder.resolve() in (Path(given).resolve(), Path(given).resolve().parent)
    of_earlier_attempt = (folder.parent / JOURNAL_NAME).is_file()
    if not is_source and (of_earlier_attempt or not folder.is_dir() or not any(folder.iterdir())):
        return False
    if checksum_in(folder) != tokenizer.sha256:
        raise DataError(
            f"{folder}: does not contain tokenizer={given}, and no earlier attempt has written it. "
            "Choose another output folder, or remove it"
        )
    return True


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Replace `folder` by a copy of the tokenizer; an earlier attempt may have had another one.

    Raises DataError if the copy has another checksum.
    """
    with writing_folder(folder) as unfinished:
        tokenizer.copy_to(unfinished)
        if folder.is_symlink():
            folder.unlink()
        elif folder.is_dir():
            shutil.rmtree(folder)
    if checksum_in(folder) != tokenizer.sha256:
        raise DataError(f"{folder}: the copy of the tokenizer's files does not load as the same tokenizer")


def checksum_in(folder: Path) -> str | None:
    """`Tokenizer.sha256` of the tokenizer in a folder; None if there is none."""
    try:
        return load_tokenizer(folder).sha256
    except DataError:
        return None


def finished(output: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a finished folder, else None; DataError if it has other settings or is damaged."""
    if (output / MANIFEST_NAME).is_dir():
        raise DataError(f"output={output}: {MANIFEST_NAME} is a folder there. Choose another folder, or remove it")
    if not (output / MANIFEST_NAME).is_file():
        return None
    manifest = load_manifest(output)
    refuse_other_settings(output, manifest.settings, settings)
    manifest.check_sizes()
    return manifest


@command("tokenize")
def main(config: DictConfig) -> None:
    """Tokenize; exit code 2 with a message on stderr if the input, an option or the folder is invalid."""
    options = to_dataclass(config, TokenizeConfig)
    manifest = tokenize(options)
    for split in get_args(Split):
        print(
            f"{manifest.folder}: {split} {manifest.documents(split):,} documents, "
            f"{manifest.tokens(split):,} tokens in {len(manifest.prefixes(split))} shards"
        )
    for fate, count in manifest.records.items():
        print(f"{manifest.folder}: {count:,} records {fate}")
    if not manifest.documents("validation") and options.validation_fraction > 0:
        logger.warning(
            f"{manifest.folder}: no document is held out for validation, so training cannot validate on it. "
            f"validation_fraction={options.validation_fraction:g} of {manifest.documents('train'):,} documents is none: "
            "raise it, or split the text into more documents (corpus.sample_by=paragraph or line for plain text)"
        )
    if not manifest.round_trip:
        print(f"{manifest.folder}: this tokenizer does not give back its text exactly (it normalises)")


if __name__ == "__main__":
    main()
