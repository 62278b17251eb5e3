"""Check that a folder of token shards is what mone-tokenize wrote.

mone-verify path=data/demo/shards/wikipedia
for damage in damages(load_manifest("data/demo/shards/wikipedia")): print(damage)
"""

import glob
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from data_prep.errors import DataError
from data_prep.shard_index import index_problems
from data_prep.shards import (
    MANIFEST_NAME,
    DamagedManifest,
    Manifest,
    Shard,
    count_tokens,
    entropy,
    load_manifest,
    megatron_indexed_dataset,
)
from data_prep.tokenizer import Tokenizer, load_tokenizer
from mone_common.console import command, to_dataclass
from mone_common.files import sha256_of


@dataclass
class VerifyConfig:
    """Options of `mone-verify`."""

    path: Any = field(default=MISSING, metadata={"kind": str | list[str]})
    """Folder of token shards, a glob of such folders, or a list of these."""
    decode_documents: int = 100
    """Documents per shard, spread evenly, to decode and encode again."""

    def __post_init__(self) -> None:
        if self.decode_documents < 0:
            raise DataError(f"decode_documents={self.decode_documents}: must be at least 0")


ConfigStore.instance().store(name="verify_schema", node=VerifyConfig)


def damages(manifest: Manifest, decode_documents: int = 100) -> Iterator[str]:
    """One sentence for everything in the folder that is not as the manifest says; none if all is well."""
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = load_tokenizer(manifest.tokenizer_path)
        yield from tokenizer_damages(manifest, tokenizer)
    except DataError as error:
        yield str(error)
    unigrams = np.zeros(manifest.vocab_size, np.int64)
    for shard in manifest.shards:
        try:
            damaged = list(file_damages(manifest, shard))
            yield from damaged
            if damaged:
                continue
            counts = count_tokens(manifest.folder / f"{shard.name}.bin", manifest.dtype, manifest.vocab_size)
            if shard.split == "train":
                unigrams += counts
            yield from content_damages(manifest, shard, tokenizer, decode_documents)
        except DataError as error:
            yield str(error)
        except OSError as error:
            yield f"{shard.name}: cannot be read ({error})"
    if unigrams.sum() == manifest.tokens("train") and entropy(unigrams) != manifest.unigram_entropy:
        found = entropy(unigrams)
        yield f"manifest.json: unigram_entropy {manifest.unigram_entropy}, the shards have {found}"


def tokenizer_damages(manifest: Manifest, tokenizer: Tokenizer) -> Iterator[str]:
    """In what the tokenizer's copy is another than the manifest's."""
    if tokenizer.sha256 != manifest.tokenizer_sha256:
        yield (
            f"{manifest.tokenizer_path}: another tokenizer than the manifest's "
            f"(sha256 {tokenizer.sha256}, manifest {manifest.tokenizer_sha256})"
        )
    for name in ("vocab_size", "eod_id"):
        here, there = getattr(manifest, name), getattr(tokenizer, name)
        if here != there:
            yield f"manifest.json: {name} {here}, the tokenizer has {there}"


def file_damages(manifest: Manifest, shard: Shard) -> Iterator[str]:
    """Files of a shard that are missing, of another size or of another checksum, and what is wrong in its index."""
    missing = False
    for file, size, sha256 in shard.files():
        path = manifest.folder / file
        if not path.is_file():
            missing = True
            yield f"{file}: missing"
        elif path.stat().st_size != size:
            yield f"{file}: {path.stat().st_size} bytes, the manifest says {size}"
        elif (found := sha256_of(path)) != sha256:
            yield f"{file}: altered (sha256 {found}, the manifest says {sha256})"
    if not missing:
        yield from index_problems(manifest.folder, shard, manifest.dtype)


def content_damages(manifest: Manifest, shard: Shard, tokenizer: Tokenizer | None, decode_documents: int) -> Iterator[str]:
    """Ends of document and decoded text of a shard whose files and index are intact."""
    dataset = megatron_indexed_dataset().IndexedDataset(str(manifest.folder / shard.name))
    tokens = np.memmap(manifest.folder / f"{shard.name}.bin", manifest.dtype, "r")
    unended = np.flatnonzero(tokens[np.cumsum(dataset.sequence_lengths, dtype=np.int64) - 1] != manifest.eod_id)
    for document in unended[:10]:
        end = f"the end-of-document token {manifest.eod_id}"
        yield f"{shard.name}: document {document} does not end with {end}"
    if tokenizer is None:
        return
    chosen = np.linspace(0, len(dataset) - 1, min(decode_documents, len(dataset)), dtype=int)
    for document in chosen:
        ids = dataset[int(document)][:-1].tolist()
        if ids and max(ids) >= tokenizer.vocab_size:
            yield f"{shard.name}: document {document} has token {max(ids)}, the tokenizer has {tokenizer.vocab_size}"
            continue
        text = tokenizer.decode(ids)
        (again,) = tokenizer.encode([text])
        if manifest.round_trip and again != ids:
            yield f"{shard.name}: document {document} decodes to text that encodes to other tokens"
        # A tokenizer that normalises may have other tokens for the same text, but no other text for those.
        elif again != ids and tokenizer.decode(again) != text:
            yield f"{shard.name}: document {document} decodes to text that encodes and decodes to another text"


def folders(path: Any) -> list[Path]:
    """The folders that the option names: entries of a list, globs expanded and sorted."""
    entries = path if isinstance(path, list) else [path]
    return [Path(p) for entry in map(str, entries) for p in sorted(glob.glob(entry)) or [entry]]


@command("verify")
def main(config: DictConfig) -> None:
    """List every damage on stdout; exit code 1 if there is any, else 2 if a folder holds nothing to verify."""
    options = to_dataclass(config, VerifyConfig)
    damaged = missing = False
    for folder in folders(options.path):
        try:
            manifest = load_manifest(folder)
            found = list(damages(manifest, options.decode_documents))
        except DamagedManifest as error:
            found = [f"{MANIFEST_NAME}: {problem}" for problem in error.problems]
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            missing = True
            continue
        for damage in found:
            print(f"{folder}: {damage}")
        if not found:
            tokens = sum(shard.tokens for shard in manifest.shards)
            print(f"{folder}: {len(manifest.shards)} shards with {tokens:,} tokens are intact")
        damaged |= bool(found)
    sys.exit(1 if damaged else 2 if missing else 0)


if __name__ == "__main__":
    main()
