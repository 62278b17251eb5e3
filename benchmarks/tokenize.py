"""Benchmarks the tokenization pipeline against sentencepiece alone, and its memory against the size of the corpus.

    python -m benchmarks.tokenize corpus='data/demo/text/*.jsonl' tokenizer=data/demo/tokenizer workers=2

Both sides use the same number of processes, are warmed up, and take turns in one run. The pipeline reads files, encodes,
splits, writes and checksums shards. The sentencepiece side encodes texts that are in the memory of its processes and returns
only counts. Run it with -m: as a script it would shadow Python's `tokenize` module.
"""

import contextlib
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from benchmarks.interleaved_timing import HYDRA, LOGGING
from data_prep.corpora import Corpus, CorpusConfig
from data_prep.encoding import EncoderPool
from data_prep.journal import Journal
from data_prep.tokenize import TokenizeConfig, tokenize, write_groups
from data_prep.tokenizer import load_tokenizer
from mone_common.console import command, to_dataclass

SPAWN = multiprocessing.get_context("spawn")


@dataclass
class BenchmarkConfig:
    """Options of the benchmark."""

    corpus: str = MISSING
    """Text to tokenize: a file, folder or glob."""
    tokenizer: str = MISSING
    """A sentencepiece model, or the folder of one."""
    workers: int = 2
    """Encoding processes on each side."""
    rounds: int = 3
    """Turns of each side; the result is the median."""
    copies: int = 4
    """Copies of the corpus per turn."""
    shard_tokens: int = 5_000_000
    """shard_tokens of mone-tokenize."""
    memory_copies: int = 8
    """Memory is measured for one copy and for this many copies of the corpus."""


ConfigStore.instance().store(name="benchmark_schema", node=BenchmarkConfig)
ConfigStore.instance().store(
    name="benchmark_tokenize", node={"defaults": ["benchmark_schema", "_self_", *LOGGING], "hydra": HYDRA}
)


def texts_of(path: str) -> list[str]:
    """All documents of the corpus."""
    return [record.text for record in Corpus(CorpusConfig(path=path)).records() if record.text]


def hold(tokenizer: str, texts: list[str]) -> None:
    """Load tokenizer and texts into this process of the sentencepiece side."""
    globals().update(held_tokenizer=load_tokenizer(tokenizer), held_texts=texts)


def encode_held(first: int, step: int) -> int:
    """Encode every `step`-th held text from `first` on, in batches of 256; return the number of tokens."""
    texts = globals()["held_texts"][first::step]
    encode = globals()["held_tokenizer"].encode
    return sum(len(ids) for start in range(0, len(texts), 256) for ids in encode(texts[start : start + 256]))


def pipeline_rate(config: BenchmarkConfig, corpus: Corpus, pool: EncoderPool) -> float:
    """Tokens per second of one pass through the pipeline with a warm pool, including shards and checksums."""
    tokenizer = load_tokenizer(config.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        options = TokenizeConfig(
            tokenizer=config.tokenizer, output=folder, shard_tokens=config.shard_tokens, progress_seconds=1e9
        )
        journal = Journal.open(Path(folder), {}, tokenizer.vocab_size)
        start = time.perf_counter()
        write_groups(options, corpus, tokenizer, pool, journal)
        seconds = time.perf_counter() - start
    return sum(shard.tokens for shard in journal.shards) / seconds


def peak_memory(config: BenchmarkConfig, paths: list[str]) -> tuple[float, float]:
    """Peak resident MB of the main process, and of it and its workers together, for `paths`."""
    peak_main = peak_all = 0
    with tempfile.TemporaryDirectory() as folder:
        process = SPAWN.Process(target=_tokenize, args=(config, paths, folder))
        process.start()
        while process.is_alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                main_process = psutil.Process(process.pid)
                resident = main_process.memory_info().rss
                workers = sum(worker.memory_info().rss for worker in main_process.children())
                peak_main, peak_all = max(peak_main, resident), max(peak_all, resident + workers)
            time.sleep(0.05)
    return peak_main / 1e6, peak_all / 1e6


def _tokenize(config: BenchmarkConfig, paths: list[str], folder: str) -> None:
    tokenize(
        TokenizeConfig(
            CorpusConfig(path=paths),
            config.tokenizer,
            folder,
            shard_tokens=config.shard_tokens,
            workers=config.workers,
            progress_seconds=1e9,
        )
    )


@command("benchmark_tokenize", path=None)
def main(config: DictConfig) -> None:
    """Print the rates, their ratio and the peak memory."""
    options = to_dataclass(config, BenchmarkConfig)
    workers = options.workers
    files = [str(path) for path in Corpus(CorpusConfig(path=options.corpus)).files]
    with tempfile.TemporaryDirectory() as folder:
        for copy in range(max(options.copies, options.memory_copies)):
            for file in files:
                Path(folder, f"{copy:03}-{Path(file).name}").symlink_to(Path(file).resolve())
        copies = [str(path) for path in sorted(Path(folder).iterdir())]
        corpus = Corpus(CorpusConfig(path=copies[: options.copies * len(files)]))
        texts = texts_of(options.corpus) * options.copies
        alone_pool = ProcessPoolExecutor(workers, SPAWN, hold, (options.tokenizer, texts))
        rates: dict[str, list[float]] = {"sentencepiece alone": [], "pipeline": []}
        with alone_pool, EncoderPool(options.tokenizer, 0.01, workers) as pool:
            pipeline_rate(options, Corpus(CorpusConfig(path=copies[: len(files)])), pool)
            list(alone_pool.map(encode_held, range(workers), [len(texts)] * workers))
            for _ in range(options.rounds):
                start = time.perf_counter()
                tokens = sum(alone_pool.map(encode_held, range(workers), [workers] * workers))
                rates["sentencepiece alone"].append(tokens / (time.perf_counter() - start))
                rates["pipeline"].append(pipeline_rate(options, corpus, pool))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for name, values in rates.items():
            print(f"{name}: {medians[name]:,.0f} tokens/s, rounds {[round(v) for v in values]}")
        print(f"ratio {medians['pipeline'] / medians['sentencepiece alone']:.3f} with {workers} processes")
        for count in (1, options.memory_copies):
            paths = copies[: count * len(files)]
            text_bytes = sum(Path(path).stat().st_size for path in paths)
            main_mb, all_mb = peak_memory(options, paths)
            print(f"{text_bytes / 1e6:.0f} MB of text: peak {main_mb:.0f} MB, with its workers {all_mb:.0f} MB")


if __name__ == "__main__":
    main()
