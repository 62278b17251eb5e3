"""Checks the .idx file of a shard; Megatron-Core does not, and fails with unclear errors if it is damaged.

for problem in header_problems(folder, shard, "uint16"): ...    # reads 34 bytes
for problem in index_problems(folder, shard, "uint16"): ...     # reads the whole file

After the header, the file contains for D documents: their lengths in tokens (int32), their offsets in bytes (int64), and
the numbers 0 .. D (int64).
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from data_prep.shards import Shard

HEADER = struct.Struct("<9sQBQQ")
MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPE_CODES = {"uint16": 8, "int32": 4}


def header_problems(folder: Path, shard: "Shard", dtype: str) -> Iterator[str]:
    """Differences between the manifest and the header and sizes of a shard's files, one sentence each."""
    name, size = f"{shard.name}.idx", (folder / f"{shard.name}.idx").stat().st_size
    with open(folder / name, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        yield f"{name}: {size} bytes, too short for an index"
        return
    magic, version, code, lengths, documents = HEADER.unpack(header)
    if magic != MAGIC:
        yield f"{name}: not an index of Megatron-Core (it begins with {magic!r})"
        return
    if version != VERSION:
        yield f"{name}: index of version {version}, this version reads {VERSION}"
    if code != DTYPE_CODES[dtype]:
        yield f"{name}: token type has code {code}, that of the manifest's {dtype} is {DTYPE_CODES[dtype]}"
    if lengths != shard.documents:
        yield f"{name}: {lengths} documents, the manifest says {shard.documents}"
    elif documents != lengths + 1:
        yield f"{name}: {documents} bounds of documents, {lengths} documents have {lengths + 1}"
    elif size != HEADER.size + 12 * lengths + 8 * documents:
        yield f"{name}: {size} bytes, {lengths} documents take {HEADER.size + 12 * lengths + 8 * documents}"
    tokens = (folder / f"{shard.name}.bin").stat().st_size / np.dtype(dtype).itemsize
    if tokens != shard.tokens:
        yield f"{shard.name}.bin: {tokens:g} tokens of type {dtype}, the manifest says {shard.tokens}"


def index_problems(folder: Path, shard: "Shard", dtype: str) -> Iterator[str]:
    """Like `header_problems`, but also checks the lengths and offsets of the documents."""
    found = list(header_problems(folder, shard, dtype))
    yield from found
    if any(problem.startswith(f"{shard.name}.idx") for problem in found):
        return
    name, size = f"{shard.name}.idx", np.dtype(dtype).itemsize
    with open(folder / name, "rb") as file:
        file.seek(HEADER.size)
        lengths = np.fromfile(file, np.int32, shard.documents).astype(np.int64)
        offsets = np.fromfile(file, np.int64, shard.documents)
        bounds = np.fromfile(file, np.int64, shard.documents + 1)
    if (lengths < 1).any():
        document = int(np.argmax(lengths < 1))
        yield f"{name}: document {document} has {lengths[document]} tokens"
    if lengths.sum() != shard.tokens:
        yield f"{name}: {lengths.sum()} tokens, the manifest says {shard.tokens}"
    wrong = offsets != size * (np.cumsum(lengths) - lengths)
    if wrong.any():
        yield f"{name}: document {int(np.argmax(wrong))} does not start at the end of the previous one"
    if (bounds != np.arange(shard.documents + 1)).any():
        yield f"{name}: the bounds of its documents are not 0 .. {shard.documents}"
