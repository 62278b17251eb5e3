"""Write safetensors files tensor by tensor, so that memory is bounded by the largest tensors and not by a file.

    for name, tensors in plan_shards(specs, largest=5 * 10**9).items():      # "model-00001-of-00003.safetensors"
        write_shard(folder / name, tensors, fill)
    write_index(folder, shards)

The safetensors library writes a file only from tensors that are all in memory. The format: 8 bytes with the length of a
JSON header, the header (type, shape and place of each tensor), and the bytes of the tensors.
"""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from mone_model.hf.safetensors_folder import INDEX, SINGLE

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Data types by their names in safetensors."""


class Spec(NamedTuple):
    """A tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(specs: Sequence[Spec], *, largest: int) -> dict[str, list[Spec]]:
    """The tensors of each file, in order; a file has at most `largest` bytes, or one larger tensor."""
    files: list[list[Spec]] = [[]]
    room = largest
    for spec in specs:
        if files[-1] and spec.size > room:
            files.append([])
            room = largest
        files[-1].append(spec)
        room -= spec.size
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{number:05}-of-{len(files):05}.safetensors": shard for number, shard in enumerate(files, start=1)}


def write_shard(path: Path, specs: Sequence[Spec], fill: Callable[[Spec, torch.Tensor], None]) -> None:
    """Write a file; `fill(spec, out)` writes the numbers of a tensor to `out`, which has its shape and type."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.size
        header[spec.name] = {"dtype": NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Two buffers: a second thread fills one while this thread writes the other. Fresh memory for each tensor would cost
    # a page fault every 4 KiB, as much time as the conversion.
    buffers = [torch.empty(max(spec.size for spec in specs), dtype=torch.uint8) for _ in range(2)]

    def filled(number: int) -> torch.Tensor:
        spec, buffer = specs[number], buffers[number % 2]
        fill(spec, buffer[: spec.size].view(spec.dtype).view(spec.shape))
        return buffer[: spec.size]

    with open(path, "wb") as file, ThreadPoolExecutor(1) as reader:
        file.write(len(text).to_bytes(8, "little") + text)
        following = reader.submit(filled, 0)
        for number in range(len(specs)):
            content = following.result()
            if number + 1 < len(specs):
                following = reader.submit(filled, number + 1)
            content.numpy().tofile(file)


def write_index(folder: Path, shards: dict[str, list[Spec]]) -> None:
    """Write the index of the files, if there are several."""
    if len(shards) > 1:
        total = sum(spec.size for specs in shards.values() for spec in specs)
        places = {spec.name: name for name, specs in shards.items() for spec in specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
