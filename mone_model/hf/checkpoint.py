"""Read the weights of a checkpoint lazily, in one process without process groups and without Megatron-Core.

    checkpoint = find_checkpoint(Path("runs/demo"))          # the newest intact checkpoint of a run, or one checkpoint
    weights = CheckpointWeights(checkpoint)
    weights.read("decoder.layers.mlp.experts.down_weight", layer=0)        # [E, H, D]

A checkpoint of any layout and engine has the same tensors. `mone_model.hf.weight_map` says what they are elsewhere.
"""

import functools
import io
import mmap
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mone_common.checkpoint_folder import Checkpoint, check_content, open_regular
from mone_common.checkpoint_index import check_executes_no_code, check_index, read_index
from mone_common.console import UserError
from mone_model.hf.imported_model import list_saved
from mone_model.hf.imported_model import model_of as model_of

IGNORED = ("optimizer.", "random/", "_extra_state")
"""Parts of names of entries that are no weights."""


def find_checkpoint(folder: Path, *, step: int | None = None, trust: bool = False, warn: Any = None) -> Checkpoint:
    """The newest checkpoint of a run that is intact, the one of `step`, or the checkpoint that `folder` is.

    trust: also accept pickled code, which reading executes. warn: called with a message for each checkpoint that is skipped.
    Raises UserError if there is none.
    """
    asked, problems = list_saved(folder, step=step)
    for checkpoint in reversed(asked):
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(functools.partial(check_content, checkpoint), checkpoint.files))
            if not trust:
                check_executes_no_code(checkpoint.path)
                check_index(checkpoint)
        except ValueError as error:
            problems.append(f"{checkpoint.path}: {str(error).replace('checkpoint.trust', 'trust')}")
            continue
        for problem in problems if warn is not None else ():
            warn(f"skipped {problem}")
        return checkpoint
    raise UserError(f"{folder}: no checkpoint can be read: {'; '.join(problems)}")


class CheckpointWeights:
    """The weights of a checkpoint by name; one layer at a time is in memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        index = read_index(checkpoint.path)
        self._entries: dict[str, Any] = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if hasattr(entry, "chunks") and not any(part in name for part in IGNORED)
        }
        self._places: dict[str, dict[tuple[int, ...], Any]] = defaultdict(dict)
        for item, place in index.storage_data.items():
            if item.fqn in self._entries:
                self._places[item.fqn][tuple(item.offset)] = place

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor; the first axis of those in `decoder.layers.` is the layer."""
        return {name: tuple(entry.size) for name, entry in self._entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The data type of a tensor."""
        dtype: torch.dtype = self._entries[name].properties.dtype
        return dtype

    def read(self, name: str, layer: int | None = None) -> torch.Tensor:
        """A tensor without its axis of layers: that of one layer, or a tensor that has no such axis (layer=None)."""
        entry = self._entries[name]
        chunks = [chunk for chunk in entry.chunks if layer is None or _holds(chunk, layer)]
        shape = tuple(entry.size) if layer is None else (1, *entry.size[1:])
        whole: torch.Tensor | None = None
        for chunk in chunks:
            part = self._load(self._places[name][tuple(chunk.offsets)])
            first = list(chunk.offsets)
            if layer is not None:
                part, first[0] = part.narrow(0, layer - first[0], 1), 0
            if part.shape == shape:
                whole = part
            else:
                whole = torch.empty(shape, dtype=part.dtype) if whole is None else whole
                whole[tuple(slice(at, at + size) for at, size in zip(first, part.shape, strict=True))] = part
        assert whole is not None, name
        return whole if layer is None else whole[0]

    def read_part(self, name: str, part: tuple[slice, ...]) -> torch.Tensor:
        """A part of a tensor, with a slice for each axis; reads only stored shards that overlap it."""
        sizes = [each.stop - each.start for each in part]
        whole = torch.zeros(sizes, dtype=self.dtype(name))
        for chunk in self._entries[name].chunks:
            here, there = [], []
            for wanted, offset, size in zip(part, chunk.offsets, chunk.sizes, strict=True):
                first, last = max(wanted.start, offset), min(wanted.stop, offset + size)
                here.append(slice(first - wanted.start, last - wanted.start))
                there.append(slice(first - offset, last - offset))
            if all(each.start < each.stop for each in here):
                whole[tuple(here)] = self._load(self._places[name][tuple(chunk.offsets)])[tuple(there)]
        return whole

    def _load(self, place: Any) -> torch.Tensor:
        """A part of a tensor as a view of the file, which is read when it is used."""
        before = place.offset % mmap.ALLOCATIONGRANULARITY
        with open_regular(self.path, place.relative_path) as file:
            # ACCESS_COPY since torch wants memory that can be written; nothing is.
            length, start = before + place.length, place.offset - before
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        saved = memoryview(mapped)[before:]
        with FakeTensorMode():  # reads the shape and the place of the numbers
            form = torch.load(io.BufferedReader(_View(saved)), weights_only=True)
        numbers = form.untyped_storage()
        flat = torch.frombuffer(
            saved, dtype=form.dtype, count=numbers.nbytes() // form.dtype.itemsize, offset=numbers._checkpoint_offset
        )
        return flat.as_strided(form.shape, form.stride(), form.storage_offset())


class _View(io.RawIOBase):
    """Memory as a file for reading, without a copy."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._at = memory, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._memory)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, target: Any) -> int:
        found = self._memory[self._at : self._at + len(target)]
        target[: len(found)] = found
        self._at += len(found)
        return len(found)


def _holds(chunk: Any, layer: int) -> bool:
    first: int = chunk.offsets[0]
    return first <= layer < first + chunk.sizes[0]
