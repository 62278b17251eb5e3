"""The tensors in the safetensors files of a Hugging Face folder: names, types and shapes, without reading their numbers.

    folder = SafetensorsFolder(Path("models/qwen"))          # UserError for a missing, truncated or foreign file
    folder.tensors["model.norm.weight"].shape                # (2048,)

`mone_model.hf.sources` reads the numbers.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mone_common.console import UserError
from mone_common.text import excerpt

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of a number, by type: those that are imported. Others, such as F8_E4M3, belong to quantized weights."""
OTHER_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
LARGEST_HEADER = 100_000_000
"""In bytes; safetensors itself refuses more."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    file: Path
    dtype: str
    """As safetensors names it: F32, F16, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Where its numbers start in the file, in bytes."""
    size: int
    """Its size in bytes."""


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        if (path / SINGLE).exists():
            self.files = [path / SINGLE]
            self.tensors = read_header(path / SINGLE)
        elif (path / INDEX).exists():
            self._read_shards(_read_json(path / INDEX))
        else:
            pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
            how = (
                f"; it has {pickles[0]}, a pickle, which can execute code: convert it with "
                "transformers' save_pretrained, which writes safetensors"
                if pickles
                else ""
            )
            raise UserError(f"{path}: has neither {SINGLE} nor {INDEX}{how}")

    def _read_shards(self, index: Any) -> None:
        shard_of = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
            raise UserError(f"{self.path / INDEX}: has no weight_map of tensor names to file names")
        names = sorted(set(shard_of.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{self.path / INDEX}: names {excerpt(outside[0])!r}, which is not a file of its folder")
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise UserError(f"{self.path}: {', '.join(missing[:3])} of {INDEX} is missing; download it again")
        self.files = [self.path / name for name in names]
        held = {file.name: read_header(file) for file in self.files}
        for name, shard in shard_of.items():
            if name not in held[shard]:
                raise UserError(f"{self.path / shard}: has no tensor {name}, which {INDEX} expects there")
            self.tensors[name] = held[shard][name]
        if extra := sorted(set[str]().union(*held.values()) - shard_of.keys()):
            raise UserError(f"{self.path / INDEX}: does not list {', '.join(extra[:3])}, which its files hold")

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same bytes; reads both."""
        a, b = self.tensors[one], self.tensors[other]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        step = 2**24
        with open(a.file, "rb") as file_a, open(b.file, "rb") as file_b:
            file_a.seek(a.start)
            file_b.seek(b.start)
            lengths = [min(step, a.size - done) for done in range(0, a.size, step)]
            return all(file_a.read(length) == file_b.read(length) for length in lengths)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; UserError if it is none, or is not whole.

    The file starts with the length of its header (8 bytes, little-endian) and the header, JSON that locates each tensor.
    """
    if not file.is_file():
        raise UserError(f"{file}: not a regular file")
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > LARGEST_HEADER:
                raise ValueError(f"it does not start with the length of a header; its size is {size} bytes")
            header = json.loads(opened.read(length))
        tensors = {name: _entry(file, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a safetensors file, or truncated ({excerpt(error)})") from error
    for name, tensor in tensors.items():
        width = (BYTES | OTHER_BYTES).get(tensor.dtype)
        if width is not None and tensor.size != width * math.prod(tensor.shape):
            raise UserError(f"{file}: damaged: {name} has {tensor.size} bytes for shape {[*tensor.shape]} of {tensor.dtype}")
    end = max((tensor.start + tensor.size for tensor in tensors.values()), default=0)
    if end > size:
        raise UserError(f"{file}: truncated: has {size} bytes of {end}; download it again")
    return tensors


def _entry(file: Path, entry: dict[str, Any], data: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise TypeError("an offset or a shape is not a number")
    return StoredTensor(file, str(entry["dtype"]), shape, data + start, end - start)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({excerpt(error)})") from error


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face folder; UserError if there is none."""
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: not a Hugging Face model: has no config.json")
    config = _read_json(path / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'}: not a JSON object")
    return config
