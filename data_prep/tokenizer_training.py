"""Training a sentencepiece model on a sample of a corpus, the same bytes on every run.

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
"""Longest line given to sentencepiece, which drops longer ones in silence (max_sentence_length)."""
RESERVED = str.maketrans("", "", "\0\u2585")
"""Characters that sentencepiece keeps for itself: it drops lines with U+2585 in silence."""


@dataclass
class TrainTokenizerConfig:
    """Options of `mone-train-tokenizer`."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    output: str = MISSING
    """Folder for tokenizer.model and tokenizer_training.json, which tells how it was made."""
    vocab_size: int = 32000
    """Pieces, the 256 byte pieces and the 3 special ones included."""
    model_type: str = "bpe"
    """bpe or unigram."""
    sample_bytes: int = 100_000_000
    """Bytes of text to train on, drawn evenly from the whole corpus; training takes 10 times the memory."""
    character_coverage: float = 0.9995
    """Share of the sample's characters that get pieces of their own; the others are spelt in bytes."""
    split_digits: bool = True
    """Make every digit a piece of its own."""
    seed: int = 0
    """Chooses the sample."""


def draw_sample(texts: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """As many texts, in the order of their keyed hashes, as fit into `sample_bytes` of UTF-8.

    Every text has the same chance wherever it stands, one that occurs twice is drawn once, the order of the
    corpus does not matter, and little more than the sample is held in memory. A text longer than the sample
    is left out.
    """
    key = seed.to_bytes(8, "little", signed=True)
    heap: list[tuple[int, str]] = []  # the largest hash on top, hence negative
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
        while size > sample_bytes:  # from here on nothing as large may enter, or order would matter
            negative, last = heapq.heappop(heap)
            limit = -negative
            drawn.remove(limit)
            size -= len(last.encode())
    return [text for _, text in sorted(heap, reverse=True)]


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of the texts, long ones cut; sentencepiece learns from single lines and knows no line break."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS].translate(RESERVED)


def train_tokenizer(config: TrainTokenizerConfig) -> dict[str, Any]:
    """Train and publish `<output>/tokenizer.model`, then `<output>/tokenizer_training.json`; return the latter.

    The text is taken as it is (no normalisation, all spaces kept), unknown characters are spelt in bytes, so
    that decoding gives back what was encoded. Raises DataError for an empty corpus and a vocabulary too large
    for it.
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
            f"{corpus.name}: no document to train on. Either the corpus is empty or every document is longer "
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
            num_threads=1,  # the sum of floating-point counts depends on how they are divided
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
            f"vocab_size={config.vocab_size}: too large for this corpus, {largest[1]} is the most that "
            f"the sample of sample_bytes={config.sample_bytes} allows. Lower it or give more text"
        )
    options = f"vocab_size={config.vocab_size}, model_type={config.model_type}"
    return f"{options}: sentencepiece says: {message.strip()}"


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
