"""From text to token shards, with several processes, continuing where an earlier run ended.

    mone-tokenize corpus.path=data/demo/text/wikipedia.jsonl tokenizer=data/demo/tokenizer output=data/wikipedia
    -> train-00000.bin/.idx, validation-00000.bin/.idx, ..., tokenizer/, manifest.json
    killed and run again: finished shards stay, the rest is made, the bytes are those of an undisturbed run
    load_manifest("data/wikipedia").tokens("train")

Documents keep the corpus's order. They are collected until a group has `shard_tokens` tokens; a group becomes one
train shard and one validation shard, whatever the number of workers, and then is on record in progress.json.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.console import reporting_errors, typed
from data_prep.corpora import Corpus, CorpusConfig, Record
from data_prep.encoding import EncoderPool
from data_prep.files import TEMPORARY_PREFIX
from data_prep.journal import Journal
from data_prep.progress import Progress
from data_prep.shards import MANIFEST_NAME, TOKENIZER_NAME, DataError, Manifest, Shard, ShardWriter, entropy
from data_prep.tokenizer import Tokenizer, load_tokenizer

ROUND_TRIP_DOCUMENTS = 32


@dataclass
class TokenizeConfig:
    """Options of `mone-tokenize`."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: str = MISSING
    """A folder written by mone-tokenizer, a sentencepiece .model file, or a Hugging Face tokenizer folder."""
    output: str = MISSING
    """Folder for the shards: one folder per corpus; several are blended in training."""
    validation_fraction: float = 0.01
    """Share of documents that are held out for validation, chosen by a hash of their text."""
    shard_tokens: int = 100_000_000
    """A shard is closed once its group of documents has so many tokens: the most that a crash costs."""
    workers: int = 1
    """Encoding processes; the output does not depend on it."""
    progress_seconds: float = 5.0
    """Seconds between two lines of progress."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise DataError(f"validation_fraction={self.validation_fraction}: must be at least 0 and below 1")
        for option in ("shard_tokens", "workers"):
            if getattr(self, option) < 1:
                raise DataError(f"{option}={getattr(self, option)}: must be at least 1")


ConfigStore.instance().store(name="tokenize_schema", node=TokenizeConfig)


def tokenize(config: TokenizeConfig) -> Manifest:
    """Tokenize the corpus into `config.output`, or continue there; return the manifest.

    Raises DataError for bad input, an output folder that holds something else, and a full disk.
    """
    corpus, tokenizer, output = Corpus(config.corpus), load_tokenizer(config.tokenizer), Path(config.output)
    settings = {
        "corpus": corpus.fingerprint() | {"name": corpus.name},
        "tokenizer_sha256": tokenizer.sha256,
        "validation_fraction": config.validation_fraction,
        "shard_tokens": config.shard_tokens,
    }
    with explaining_os_errors(output), locked(output):
        if (manifest := finished(output, settings)) is not None:
            return manifest
        journal = Journal.open(output, settings, tokenizer.vocab_size)
        for leftover in output.glob(f"{TEMPORARY_PREFIX}*"):
            leftover.unlink()
        (output / TOKENIZER_NAME).mkdir(exist_ok=True)
        tokenizer.copy_to(output / TOKENIZER_NAME)
        with EncoderPool(str(output / TOKENIZER_NAME), config.validation_fraction, config.workers) as pool:
            write_groups(config, corpus, tokenizer, pool, journal)
        return publish_manifest(corpus, tokenizer, journal)
