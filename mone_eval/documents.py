"""Documents to score: tokens of a model's tokenizer, and the bytes of their text.

    documents = read_documents(CorpusConfig(path="data/*.jsonl"), tokenizer, max_documents=100)
    documents = read_documents(CorpusConfig(path="data/demo/shards/*"), tokenizer)      # folders of mone-tokenize
    documents[0].name, documents[0].tokens, documents[0].num_bytes
    checksum(documents)                                                                 # identifies the scored text

The text of token shards is decoded with the tokenizer of the shards and encoded with that of the model, so that any model
can be scored on them. Sums of losses over bytes are comparable between tokenizers.
"""

import glob
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.corpora import Corpus, CorpusConfig
from data_prep.errors import DataError
from data_prep.shards import MANIFEST_NAME, Manifest, Split, load_manifest, megatron_indexed_dataset
from data_prep.tokenizer import load_tokenizer

ENCODED_TOGETHER = 64
"""Number of texts that a tokenizer encodes in one call, which may use several threads."""


class Text(NamedTuple):
    """One document of a corpus."""

    name: str
    """`file:number`, numbers from 1."""
    text: str
    """Its text; not empty."""


@dataclass(frozen=True)
class Document:
    """One document in the tokens of a model."""

    name: str
    """Where the document is: `file:number`, numbers from 1."""
    tokens: torch.Tensor
    """[T] int64: its tokens, without special tokens."""
    num_bytes: int
    """Bytes of its text in UTF-8."""
    sha256: str
    """Checksum of its text."""


def read_documents(
    config: CorpusConfig,
    tokenizer: Any,
    *,
    split: Split = "validation",
    max_documents: int | None = None,
    max_bytes: int | None = None,
) -> list[Document]:
    """The first documents of a corpus.

    config: its path may also name folders of token shards. tokenizer: of transformers. split: of token shards. max_bytes: no
    document is read after the one that reaches this many bytes of text. Raises DataError if the corpus cannot be read or has
    no text.
    """
    texts = limit(read_texts(config, split=split), max_documents=max_documents, max_bytes=max_bytes)
    documents = list(encode(texts, tokenizer))
    if not documents:
        raise DataError(f"corpus.path={config.path or config.hub}: has no text")
    return documents


def read_texts(config: CorpusConfig, *, split: Split = "validation") -> Iterator[Text]:
    """All texts of a corpus or of token shards in order, empty ones aside; see `read_documents`."""
    folders = shard_folders(config)
    if folders:
        for folder in folders:
            yield from _decoded(load_manifest(folder), split)
    else:
        corpus = Corpus(config)
        for record in corpus.records():
            if record.text:
                yield Text(corpus.where(record.next), record.text)


def encode(texts: Iterable[Text], tokenizer: Any) -> Iterator[Document]:
    """Each text in the tokens of a tokenizer of transformers; special tokens are neither added nor recognised."""
    texts = iter(texts)
    while part := list(itertools.islice(texts, ENCODED_TOGETHER)):
        encoded = tokenizer(
            [text.text for text in part],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,  # a document may be longer than the context
        )["input_ids"]
        for text, tokens in zip(part, encoded, strict=True):
            content = text.text.encode("utf-8", "surrogatepass")
            yield Document(
                text.name, torch.tensor(tokens, dtype=torch.int64), len(content), hashlib.sha256(content).hexdigest()
            )


def checksum(documents: Iterable[Document]) -> str:
    """Identifies the texts and their order; independent of tokenizer and file names."""
    return hashlib.sha256("".join(document.sha256 for document in documents).encode()).hexdigest()


def shard_folders(config: CorpusConfig) -> list[Path]:
    """The folders of token shards that a corpus names; empty if it names text.

    Raises DataError if it names both.
    """
    entries = config.path if isinstance(config.path, list) else [config.path] if config.path else []
    paths = [Path(path) for entry in map(str, entries) for path in sorted(glob.glob(entry)) or [entry]]
    folders = [path for path in paths if (path / MANIFEST_NAME).is_file()]
    if folders and len(folders) < len(paths):
        text = next(path for path in paths if path not in folders)
        raise DataError(f"corpus.path={config.path}: {folders[0]} has token shards, {text} has not; name one kind")
    return folders


def _decoded(manifest: Manifest, split: Split) -> Iterator[Text]:
    manifest.check_sizes()
    tokenizer = load_tokenizer(manifest.tokenizer_path)
    for prefix in manifest.prefixes(split):
        dataset = megatron_indexed_dataset().IndexedDataset(prefix)
        for number in range(len(dataset)):
            text = tokenizer.decode(dataset[number][:-1].tolist())
            if text and not text.isspace():
                yield Text(f"{prefix}:{number + 1}", text)


def limit(texts: Iterable[Text], *, max_documents: int | None, max_bytes: int | None) -> Iterator[Text]:
    """The first texts; see `read_documents`."""
    read = 0
    for text in itertools.islice(texts, max_documents):
        yield text
        read += len(text.text.encode("utf-8", "surrogatepass"))
        if max_bytes is not None and read >= max_bytes:
            return
