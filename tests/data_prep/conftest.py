"""A made-up corpus, a tokenizer trained on it, and ways to run the commands without starting processes."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import encoding
from data_prep import tokenize as tokenize_module
from data_prep.corpora import CorpusConfig, Record
from data_prep.encoding import Encoded, batches, encode_batch
from data_prep.tokenize import TokenizeConfig
from data_prep.tokenizer import load_tokenizer
from data_prep.tokenizer_training import TrainTokenizerConfig, train_tokenizer
from mone_common.locks import LOCK_FILE


def made_up_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of made-up words over several lines, all different."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    return [f"Document {n}.\n" + " ".join(rng.choices(words, k=rng.randint(5, 60))) for n in range(count)]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """One record per text."""
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            file.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes, but for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class InlinePool:
    """Replacement of `EncoderPool` that encodes in this process."""

    def __init__(self, tokenizer: str, validation_fraction: float, workers: int) -> None:
        self._tokenizer, self._fraction = load_tokenizer(tokenizer), validation_fraction

    def __enter__(self) -> "InlinePool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def encode(self, records: Iterable[Record]) -> Iterator[tuple[list[Record], Encoded]]:
        """See `EncoderPool.encode`."""
        for batch in batches(records):
            yield batch, encode_batch(self._tokenizer, [record.text for record in batch], self._fraction)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split a small corpus into many batches."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 3000)


@pytest.fixture
def inline_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode in this process, because worker processes are slow to start."""
    monkeypatch.setattr(tokenize_module, "EncoderPool", InlinePool)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """300 made-up documents."""
    return made_up_documents(300)


@pytest.fixture(scope="session")
def corpus_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents as JSON lines."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "made_up.jsonl", documents)


@pytest.fixture(scope="session")
def tokenizer_folder(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece tokenizer trained on the made-up corpus."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TrainTokenizerConfig(CorpusConfig(path=str(corpus_file)), str(folder), vocab_size=600))
    return folder


@pytest.fixture
def options(corpus_file: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., TokenizeConfig]:
    """Options that tokenize the made-up corpus into several small shards; keywords change them."""

    def make(corpus: dict[str, Any] | None = None, **changes: Any) -> TokenizeConfig:
        return TokenizeConfig(
            corpus=CorpusConfig(**{"path": str(corpus_file), **(corpus or {})}),
            **{
                "tokenizer": str(tokenizer_folder),
                "output": str(tmp_path / "shards"),
                "validation_fraction": 0.1,
                "shard_tokens": 2000,
                **changes,
            },
        )

    return make
