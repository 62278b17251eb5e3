"""Weights of Hugging Face folders and of our checkpoints, for new models on any layout.

    source = open_weights(find_model(Path("models/qwen")), model, checkpoint=None)
    source.read(Wanted("decoder.layers.mlp.router.weight", (0,), (128, 2048), (slice(0, 128), slice(0, 2048))))

A rank reads only what it asks for.
"""

import functools
from pathlib import Path
from typing import Any

import torch

from mone_common.checkpoint_folder import Checkpoint
from mone_model.config import ModelConfig
from mone_model.hf.checkpoint import CheckpointWeights
from mone_model.hf.conversion import check_complete
from mone_model.hf.imported_model import ImportedModel, model_of
from mone_model.hf.model_folder import ModelFolder
from mone_model.hf.weight_map import LAYERS, Part
from mone_model.weight_sources import NEURON_BIAS, Wanted, WeightSource


def open_weights(imported: ImportedModel, model: ModelConfig, *, checkpoint: Checkpoint | None) -> WeightSource:
    """The weights of an imported model for `model`, whose vocabulary may have other padding.

    checkpoint: the one of `imported.checkpoints` to read, whose content has been verified.
    """
    if imported.folder is not None:
        return HuggingFaceWeights(imported.folder, model)
    assert checkpoint is not None
    return StoredWeights(checkpoint)


class HuggingFaceWeights:
    """The weights of a Hugging Face folder, by the names of our checkpoints."""

    def __init__(self, folder: ModelFolder, model: ModelConfig) -> None:
        self.tensors, self.table = folder.stored.tensors, folder.table(model)
        self._open = functools.cache(_open)

    def read(self, wanted: Wanted) -> torch.Tensor | None:
        """See `WeightSource`."""
        if wanted.key.endswith(NEURON_BIAS) and (wanted.key, wanted.place) not in self.table:
            return None
        weight = self.table[wanted.key, wanted.place]
        assert weight.shape == wanted.shape, (weight, wanted)
        rows, *columns = wanted.part
        found, start = [], 0
        for part in weight.parts:
            first, last = max(rows.start, start), min(rows.stop, start + part.rows)
            if first < last:
                found.append(self._read(part, slice(first - start, last - start), tuple(columns)))
            start += part.rows
        dtype = functools.reduce(torch.promote_types, (piece.dtype for piece in found))
        return found[0] if len(found) == 1 else torch.cat([piece.to(dtype) for piece in found])

    def _read(self, part: Part, rows: slice, columns: tuple[slice, ...]) -> torch.Tensor:
        """Some rows of a part, and these columns if it is a matrix."""
        if part.tensor is None:
            sizes = [rows.stop - rows.start, *(each.stop - each.start for each in columns)]
            return torch.zeros(sizes, dtype=torch.bfloat16)  # which every type can hold
        there = slice(part.first + rows.start, part.first + rows.stop)
        index = (*columns, there) if part.transposed else (there, *columns)
        stack = tuple(slice(place, place + 1) for place in part.at)
        piece: torch.Tensor = self._open(self.tensors[part.tensor].file).get_slice(part.tensor)[(*stack, *index)]
        piece = piece.flatten(0, len(stack)) if stack else piece
        return piece.T if part.transposed else piece


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, "pt")


class StoredWeights:
    """The weights of one of our checkpoints. UserError names a tensor that is missing, unexpected or has another shape."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.weights = CheckpointWeights(checkpoint)
        check_complete(self.weights, model_of(checkpoint))

    def read(self, wanted: Wanted) -> torch.Tensor | None:
        """See `WeightSource`."""
        if wanted.key.endswith(NEURON_BIAS) and wanted.key not in self.weights.shapes:
            return None
        stored = self.weights.shapes[wanted.key]
        rows, *others = wanted.part
        if wanted.key.startswith(LAYERS) or stored[0] >= rows.stop:
            stack = tuple(slice(place, place + 1) for place in wanted.place)
            part = self.weights.read_part(wanted.key, (*stack, rows, *others))
            return part.flatten(0, len(stack)) if stack else part
        # The vocabulary is padded further than in the checkpoint.
        known = slice(min(rows.start, stored[0]), stored[0])
        part = self.weights.read_part(wanted.key, (known, *others))
        return torch.cat([part, part.new_zeros(rows.stop - rows.start - len(part), *part.shape[1:])])
