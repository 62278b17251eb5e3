"""Trains a sentencepiece model on a sample of a corpus; equal options and texts give equal bytes.

mone-train-tokenizer 'corpus.path=data/demo/text/*.jsonl' vocab_size=8192 output=data/demo/tokenizer
report = train_tokenizer(TrainTokenizerConfig(corpus=CorpusConfig(path="text"), output="tokenizer"))
# tokenizer/tokenizer.model, tokenizer/tokenizer_training.json
"""

import hashlib
import heapq
import io
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.corpora import START, Corpus, CorpusConfig
from data_prep.errors import DataError, naming_folder
from data_prep.progress import Progress
from data_prep.shards import publish_json
from data_prep.tokenizer import MODEL_NAME, SentencePieceTokenizer
from mone_common.console import command, to_dataclass
from mone_common.files import writing

logger = logging.getLogger(__name__)

REPORT_NAME = "tokenizer_training.json"
PROGRESS_SECONDS = 5.0
LINE_CHARACTERS = 4000
"""Longest line for sentencepiece, which silently drops lines longer than max_sentence_length."""
RESERVED = str.maketrans("", "", "\0\u2585")
"""Characters that sentencepiece reserves; it silently drops lines with U+2585."""


@dataclass
class TrainTokenizerConfig:
    """Options of `mone-train-tokenizer`."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    output: str = MISSING
    """Folder for tokenizer.model and tokenizer_training.json, which records the training."""
    vocab_size: int = 32000
    """Number of tokens, including 256 byte tokens and 3 special tokens."""
    model_type: str = "bpe"
    """bpe or unigram."""
    sample_bytes: int = 100_000_000
    """Bytes of training text, sampled uniformly from the corpus; training needs 10 times as much memory."""
    character_coverage: float = 0.9995
    """Share of the sample's characters that get tokens; other characters are encoded as bytes."""
    split_digits: bool = True
    """Encode every digit as a token of its own."""
    seed: int = 0
    """Seed of the sample."""


def draw_sample(texts: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """The texts with the smallest keyed hashes that fit in `sample_bytes` of UTF-8, in the order of the hashes.

    Every text has the same probability, independent of its position. Duplicates are drawn once. A text longer than
    `sample_bytes` is left out. The memory needed is little more than the sample.
    """
    key = seed.to_bytes(8, "little", signed=True)
    heap: list[tuple[int, str]] = []  # hashes are negative, so that the largest one is on top
    drawn: set[int] = set()
    size = 0
    limit = 1 << 64
    for text in texts:
        content = text.encode()
        rank = int.from_bytes(hashlib.blake2b(content, digest_size=8, key=key).digest())
        if rank >= limit or rank in drawn or len(content) > sample_bytes:
            continue
        heapq.heappush(heap, (-rank, text))
        drawn.add(rank)
        size += len(content)
        while size > sample_bytes:  # later texts must have smaller hashes, or the order of the corpus would matter
            negative, last = heapq.heappop(heap)
            limit = -negative
            drawn.remove(limit)
            size -= len(last.encode())
    return [text for _, text in sorted(heap, reverse=True)]


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts, split if they are too long; sentencepiece trains on single lines."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS].translate(RESERVED)


def train_tokenizer(config: TrainTokenizerConfig) -> dict[str, Any]:
    """Train and write `<output>/tokenizer.model` and `<output>/tokenizer_training.json`; return the contents of the latter.

    The text is not normalised, all spaces are kept and unknown characters are encoded as bytes, so decoding reproduces the
    encoded text. Raises DataError for an empty corpus and for a vocabulary that is too large for the corpus.
    """
    import sentencepiece

    if config.model_type not in ("bpe", "unigram"):
        raise DataError(f"model_type={config.model_type}: must be bpe or unigram")
    corpus = Corpus(config.corpus)
    logger.info(corpus.describe())
    progress = Progress(corpus, PROGRESS_SECONDS, START)
    longer = 0

    def texts() -> Iterator[str]:
        nonlocal longer
        for record in progress.watch(corpus.records()):
            longer += len(record.text.encode()) > config.sample_bytes
            if record.text:
                yield record.text

    sample = draw_sample(texts(), config.sample_bytes, config.seed)
    if not sample:
        raise DataError(
            f"{corpus.name}: no document to train on. Either the corpus is empty, or every document is longer "
            f"than sample_bytes={config.sample_bytes}"
        )
    reserved = sum(text.translate(RESERVED) != text for text in sample)
    if longer:
        logger.warning(f"{corpus.name}: {longer:,} documents left out, longer than sample_bytes={config.sample_bytes}")
    if reserved:
        logger.warning(
            f"{corpus.name}: NUL and U+2585, which sentencepiece reserves, are left out of {reserved:,} documents"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(sample),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            split_digits=config.split_digits,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * LINE_CHARACTERS,
            train_extremely_large_corpus=config.sample_bytes > 1 << 30,
            num_threads=1,  # the rounding of sums, and so the model, depends on the number of threads
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise DataError(_explanation(str(error), config)) from error
    output = Path(config.output)
    with naming_folder("output", output), writing(output / MODEL_NAME) as unfinished:
        unfinished.write_bytes(model.getvalue())
    trained = SentencePieceTokenizer(output / MODEL_NAME)
    report = {
        "sha256": trained.sha256,
        "vocab_size": trained.vocab_size,
        "eod_id": trained.eod_id,
        "sample": {
            "documents": len(sample),
            "bytes": sum(len(text.encode()) for text in sample),
            "documents_longer_than_sample": longer,
            "documents_with_reserved_characters": reserved,
        },
        "settings": {k: v for k, v in asdict(config).items() if k != "output"},
        "sentencepiece": sentencepiece.__version__,
    }
    publish_json(output / REPORT_NAME, report)
    return report


def _explanation(message: str, config: TrainTokenizerConfig) -> str:
    if largest := re.search(r"set it to a value <= (\d+)", message):
        return (
            f"vocab_size={config.vocab_size}: too large for this corpus; the maximum for the sample of "
            f"sample_bytes={config.sample_bytes} is {largest[1]}. Lower it or give more text"
        )
    options = f"vocab_size={config.vocab_size}, model_type={config.model_type}"
    return f"{options}: sentencepiece failed: {message.strip()}"


ConfigStore.instance().store(name="train_tokenizer_schema", node=TrainTokenizerConfig)


@command("train_tokenizer")
def main(config: DictConfig) -> None:
    """Train a tokenizer; exit code 2 with a message on stderr if it cannot be done."""
    options = to_dataclass(config, TrainTokenizerConfig)
    report = train_tokenizer(options)
    print(
        f"{options.output}: {report['vocab_size']} pieces from {report['sample']['bytes'] / 1e6:.1f} MB "
        f"of {report['sample']['documents']} documents, sha256 {report['sha256']}"
    )


if __name__ == "__main__":
    main()
