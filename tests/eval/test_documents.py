"""Documents from text and from token shards."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from data_prep import tokenize
from data_prep.corpora import CorpusConfig
from data_prep.errors import DataError
from mone_eval.documents import checksum, read_documents
from mone_model.hf.tokenizer import write_tokenizer
from tests.hf.test_tokenizer import trained as trained

TEXTS = ["The licence applies.", "\n", "Ä second <s> document of text\n", "Third: 日本語", "x" * 300]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file with five records, one of them empty."""
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


def test_text_and_shards_give_the_same_documents(corpus: Path, trained: Path, tmp_path: Path) -> None:
    write_tokenizer(trained, tmp_path, context=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    documents = read_documents(CorpusConfig(path=str(corpus)), tokenizer)
    texts = [text for text in TEXTS if text.strip()]
    assert [document.num_bytes for document in documents] == [len(text.encode()) for text in texts]
    assert [tokenizer.decode(document.tokens) for document in documents] == texts
    assert documents[1].name == f"{corpus}:3"
    shards = tokenize.TokenizeConfig(tokenizer=str(trained), output=str(tmp_path / "shards"), validation_fraction=0)
    shards.corpus.path = str(corpus)
    tokenize.tokenize(shards)
    of_shards = read_documents(CorpusConfig(path=str(tmp_path / "shard*")), tokenizer, split="train")
    assert checksum(of_shards) == checksum(documents)
    for document, other in zip(documents, of_shards, strict=True):
        assert document.tokens.tolist() == other.tokens.tolist()
        assert document.num_bytes == other.num_bytes
    with pytest.raises(DataError, match="has no text"):
        read_documents(CorpusConfig(path=str(tmp_path / "shards")), tokenizer, split="validation")
    with pytest.raises(DataError, match="name one kind"):
        read_documents(CorpusConfig(path=[str(tmp_path / "shards"), str(corpus)]), tokenizer)


def test_limits(corpus: Path, trained: Path, tmp_path: Path) -> None:
    write_tokenizer(trained, tmp_path, context=64)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), CorpusConfig(path=str(corpus))
    assert len(read_documents(config, tokenizer, max_documents=2)) == 2
    first = len(TEXTS[0].encode())
    assert len(read_documents(config, tokenizer, max_bytes=first)) == 1
    assert len(read_documents(config, tokenizer, max_bytes=first + 1)) == 2
