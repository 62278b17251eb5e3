"""Reads and writes folders of token shards.

    manifest = load_manifest("data/demo/shards/wikipedia")
    manifest.check_sizes()
    manifest.prefixes("train")           # ["data/demo/shards/wikipedia/train-00000", ...], for IndexedDataset
    manifest.tokens("train"), manifest.vocab_size, manifest.eod_id
    load_tokenizer(manifest.tokenizer_path)

A shard is an indexed dataset of Megatron-Core: `<split>-<number>.bin` contains the tokens, `.idx` the lengths of the
documents.
"""

import json
import math
import re
import reprlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from data_prep.errors import DataError as DataError
from data_prep.json_fields import field_problems, is_of
from data_prep.shard_index import header_problems
from mone_common.files import publish, sha256_of, temporary, writing
from mone_common.megatron_jit import leave_out_jit

FORMAT = "mone-token-shards-1"
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer"
MAX_VOCABULARY = 1 << 24
"""Limit for damaged files: a larger vocabulary would allocate huge tables."""
MAX_NAME_BYTES = 200
"""Longest name of a shard; file systems allow 255 bytes including prefixes and suffixes."""

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Shard:
    """One `.bin`/`.idx` pair of the manifest."""

    name: str
    """File name without its suffix: train-00000."""
    split: str
    """train or validation."""
    documents: int
    """Documents, each one sequence of the indexed dataset."""
    tokens: int
    """Tokens, including the end-of-document tokens."""
    bin_bytes: int
    """Size of the .bin file."""
    idx_bytes: int
    """Size of the .idx file."""
    bin_sha256: str
    """Checksum of the .bin file."""
    idx_sha256: str
    """Checksum of the .idx file."""
    source: str
    """Range of its records in the corpus: after `file:number` - up to `file:number`, numbers from 1."""

    def files(self) -> Iterable[tuple[str, int, str]]:
        """Name, size in bytes and sha256 of each of the two files."""
        yield f"{self.name}.bin", self.bin_bytes, self.bin_sha256
        yield f"{self.name}.idx", self.idx_bytes, self.idx_sha256


@dataclass(frozen=True)
class Manifest:
    """The manifest.json of a folder that `mone-tokenize` wrote."""

    folder: Path
    """The folder as given to `load_manifest`; not stored."""
    name: str
    """Name of the corpus in the reports of training."""
    vocab_size: int
    """Token ids are 0 .. vocab_size - 1."""
    eod_id: int
    """Token that ends every document."""
    dtype: str
    """numpy type of the tokens on disk: uint16 or int32."""
    tokenizer_sha256: str
    """Checksum of the tokenizer, see `Tokenizer.sha256`."""
    round_trip: bool
    """Whether decoding reproduced a sample of the documents of each group exactly; false if the tokenizer normalises or
    drops characters."""
    unigram_entropy: float
    """Entropy of the training tokens' unigram distribution, nats per token: the lowest loss of a model that ignores the
    context."""
    records: dict[str, int]
    """Number of records by `corpora.Record.fate`."""
    settings: dict[str, Any]
    """Options and fingerprint of the corpus."""
    shards: tuple[Shard, ...]
    """All shards, in corpus order."""

    @property
    def tokenizer_path(self) -> Path:
        """The copy of the tokenizer in this folder, for `load_tokenizer`."""
        return self.folder / TOKENIZER_NAME

    def of_split(self, split: Split) -> list[Shard]:
        """The shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def prefixes(self, split: Split) -> list[str]:
        """Path prefixes of the split's shards for `IndexedDataset`, in order."""
        return [str(self.folder / shard.name) for shard in self.of_split(split)]

    def tokens(self, split: Split) -> int:
        """Tokens of the split, including end-of-document tokens."""
        return sum(shard.tokens for shard in self.of_split(split))

    def documents(self, split: Split) -> int:
        """Documents of the split."""
        return sum(shard.documents for shard in self.of_split(split))

    def check_sizes(self) -> None:
        """Compare the sizes of all shard files and the headers of their indices with the manifest; does not read tokens.

        Raises DataError that names the shards that are missing or have another size, count or token type.
        """
        problems = size_problems(self.folder, self.shards)
        if not problems:
            problems = [p for shard in self.shards for p in header_problems(self.folder, shard, self.dtype)]
        if problems:
            raise DataError(
                f"{self.folder}: {'; '.join(problems[:10])}. Run mone-verify path={self.folder} for a full list, "
                "then remove the folder and run mone-tokenize again"
            )

    def save(self) -> None:
        """Write manifest.json to the folder; equal runs write equal bytes."""
        content = {k: v for k, v in asdict(self).items() if k != "folder"}
        publish_json(self.folder / MANIFEST_NAME, {"format": FORMAT, **content})


class DamagedManifest(DataError):
    """A damaged manifest.json; `problems` has one sentence for each fault."""

    def __init__(self, path: Path, problems: list[str], how: str) -> None:
        super().__init__(f"{path}: damaged ({'; '.join(problems[:5])}). {how}")
        self.problems = problems


def load_manifest(folder: str | Path) -> Manifest:
    """Read `<folder>/manifest.json`.

    Raises DataError if the folder or the manifest is missing, and DamagedManifest if it is unreadable, has another format,
    or has fields with wrong types or impossible values.
    """
    folder = Path(folder)
    how = f"Create it with: mone-tokenize corpus.path=TEXT tokenizer=TOKENIZER output={folder}"
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of token shards. {how}")
    if not path.is_file():
        raise DataError(f"{folder}: no {MANIFEST_NAME}, so the tokenization has not finished. {how}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedManifest(path, [f"cannot be read: {error}"], how) from error
    if problems := list(_manifest_problems(content)):
        raise DamagedManifest(path, problems, how)
    shards = tuple(Shard(**shard) for shard in content.pop("shards"))
    del content["format"]
    return Manifest(folder=folder, shards=shards, **content)


def _manifest_problems(content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"contains {reprlib.repr(content)}, not the fields of a manifest"
        return
    if content.get("format") != FORMAT:
        yield f"format {content.get('format')!r}, this version reads {FORMAT!r}"
        return
    problems = list(field_problems(Manifest, content, {"folder": None, "format": None, "shards": list}))
    yield from problems
    shards = content.get("shards")
    yield from shard_problems(shards if isinstance(shards, list) else [])
    if problems:
        return
    vocab_size, entropy = content["vocab_size"], content["unigram_entropy"]
    if not 0 < vocab_size <= MAX_VOCABULARY:
        yield f"vocab_size is {vocab_size}, must be 1 to {MAX_VOCABULARY}"
    elif content["dtype"] != dtype_of(vocab_size):
        yield f"dtype is {content['dtype']!r}, that of vocab_size {vocab_size} is {dtype_of(vocab_size)!r}"
    if not 0 <= content["eod_id"] < vocab_size:
        yield f"eod_id is {content['eod_id']}, must be below vocab_size {vocab_size}"
    if not 0 <= entropy <= math.log(MAX_VOCABULARY):
        yield f"unigram_entropy is {reprlib.repr(entropy)}, must be a number of nats, {math.log(MAX_VOCABULARY):.1f} at most"
    for fate, count in content["records"].items():
        if not is_of(count, int) or count < 0:
            yield f"records.{fate} is {reprlib.repr(count)}, must be a count"


def shard_problems(shards: list[Any]) -> Iterator[str]:
    """Problems of stored `Shard`s, one sentence each; does not read their files."""
    names = [shard.get("name") if isinstance(shard, dict) else None for shard in shards]
    for number, shard in enumerate(shards):
        where = f"shards.{number}"
        if not isinstance(shard, dict):
            yield f"{where} is {reprlib.repr(shard)}, not the fields of a shard"
            continue
        problems = list(field_problems(Shard, shard, {}, f"{where}."))
        yield from problems
        if problems:
            continue
        if not re.fullmatch(r"\w[\w.-]*", shard["name"]) or len(shard["name"].encode()) > MAX_NAME_BYTES:
            yield f"{where}.name is {reprlib.repr(shard['name'])}, not the name of a file in the folder"
        elif names.count(shard["name"]) > 1:
            yield f"{where}.name is also the name of another shard: {shard['name']}"
        if shard["split"] not in get_args(Split):
            yield f"{where}.split is {reprlib.repr(shard['split'])}, must be train or validation"
        for name in ("documents", "tokens", "bin_bytes", "idx_bytes"):
            if shard[name] < 1:
                yield f"{where}.{name} is {shard[name]}, must be positive"


def size_problems(folder: Path, shards: Iterable[Shard]) -> list[str]:
    """Shard files that are missing or have another size, one sentence each."""
    problems = []
    for shard in shards:
        for file, size, _ in shard.files():
            path = folder / file
            if not path.is_file():
                problems.append(f"shard {file} is missing")
            elif path.stat().st_size != size:
                problems.append(f"shard {file} has {path.stat().st_size} bytes, the manifest says {size}")
    return problems


def publish_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON atomically."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    with writing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def entropy(counts: np.ndarray) -> float:
    """Entropy -sum p ln p in nats, where p is `counts` [vocab_size] divided by its sum."""
    p = counts[counts > 0] / max(counts.sum(), 1)
    return abs(float(-(p * np.log(p)).sum()))


def dtype_of(vocab_size: int) -> str:
    """numpy type of the tokens on disk: uint16 if every id fits, else int32."""
    return "uint16" if vocab_size <= 1 << 16 else "int32"


def megatron_indexed_dataset() -> Any:
    """Import Megatron-Core's indexed_dataset without its warnings; the import takes seconds, so it is not at the top."""
    leave_out_jit()  # the import includes layers, which are not used here
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def count_tokens(bin_path: Path, dtype: str, vocab_size: int) -> np.ndarray:
    """Occurrences [vocab_size] int64 of each token id in a .bin file; DataError for an id outside the vocabulary."""
    counts = np.zeros(vocab_size, np.int64)
    with open(bin_path, "rb") as file:
        while len(tokens := np.fromfile(file, dtype, 1 << 20)):
            if problem := range_problem(tokens, vocab_size):
                raise DataError(f"{bin_path.name}: {problem}")
            part = np.bincount(tokens)
            counts[: len(part)] += part
    return counts


def range_problem(tokens: np.ndarray, vocab_size: int) -> str | None:
    """The first token id that is not 0 .. vocab_size - 1, as a sentence; None if there is none."""
    if len(tokens) == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return None
    return f"token {tokens[(tokens < 0) | (tokens >= vocab_size)][0]} outside the vocabulary of {vocab_size}"


class ShardWriter:
    """Collects the documents of one shard in temporary files; `finish` gives them their final names."""

    def __init__(self, folder: Path, name: str, split: Split, dtype: str) -> None:
        self.folder, self.name, self.split = folder, name, split
        self.documents = self.tokens = 0
        bin_path = str(temporary(folder / f"{name}.bin"))
        self._builder = megatron_indexed_dataset().IndexedDatasetBuilder(bin_path, np.dtype(dtype).type)

    def add(self, tokens: np.ndarray) -> None:
        """Append one document: `tokens` [length] with its end-of-document."""
        self._builder.add_document(tokens, [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self, source: str) -> Shard:
        """Write the index and publish both files; source: see `Shard.source`."""
        bin_path, idx_path = (self.folder / f"{self.name}{suffix}" for suffix in (".bin", ".idx"))
        self._builder.finalize(str(temporary(idx_path)))
        for path in (bin_path, idx_path):
            publish(path)
        return Shard(
            name=self.name,
            split=self.split,
            documents=self.documents,
            tokens=self.tokens,
            bin_bytes=bin_path.stat().st_size,
            idx_bytes=idx_path.stat().st_size,
            bin_sha256=sha256_of(bin_path),
            idx_sha256=sha256_of(idx_path),
            source=source,
        )
