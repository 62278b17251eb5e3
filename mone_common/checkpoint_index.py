"""The index of a checkpoint: which part of which tensor is where in its files. It is a pickle, which is read safely.

check_executes_no_code(checkpoint.path)      # ValueError if loading the checkpoint would execute code from it
check_index(checkpoint)                      # ValueError unless it locates every part of every tensor
index = read_index(checkpoint.path)          # torch.distributed.checkpoint's Metadata
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch

from mone_common.checkpoint_folder import COMMON, METADATA, Checkpoint, open_regular, read_manifest
from mone_common.text import excerpt

# The classes in the .metadata of Megatron-Core and torch.
_METADATA_NAMES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "BytesIOWriteData"),
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch.serialization", "_get_layout"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _METADATA_NAMES and not (
            module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)
        ):
            raise ValueError(f"{METADATA} would execute {module}.{name}")
        return super().find_class(module, name)


def check_executes_no_code(path: Path) -> None:
    """ValueError if loading this checkpoint would execute code from it.

    Tensors contain no code. The pickled index of the tensors may use only the classes of _METADATA_NAMES. Pickled objects
    must load with torch's weights_only.
    """
    refusal = "refused: {}; set checkpoint.trust=true if you trust its source"
    try:
        metadata = read_index(path)
        files = read_manifest(path).files
        for index, place in metadata.storage_data.items():
            if getattr(place, "transform_descriptors", None):
                raise ValueError("its files are transformed, which this check does not support")
            if place.relative_path not in files:
                raise ValueError(f"{METADATA} names {excerpt(place.relative_path)!r}, which is not one of its files")
            if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
                with open_regular(path, place.relative_path) as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        if COMMON in files:  # Megatron-Core 0.19 does not write it
            with open_regular(path, COMMON) as file:
                torch.load(file, weights_only=True)
    except Exception as error:  # an invalid pickle can raise anything
        raise ValueError(refusal.format(excerpt(error) or type(error).__name__)) from error


def check_index(checkpoint: Checkpoint) -> None:
    """ValueError unless the index locates every part of every tensor within the files; missing parts would stay unfilled."""
    metadata = read_index(checkpoint.path)
    for index, place in metadata.storage_data.items():
        if not 0 <= place.offset <= place.offset + place.length <= checkpoint.files[place.relative_path]["size"]:
            raise ValueError(f"damaged: {METADATA} locates {index.fqn} beyond the end of {place.relative_path}")
    stored = {(index.fqn, tuple(index.offset or ())) for index in metadata.storage_data}
    for name, entry in metadata.state_dict_metadata.items():
        chunks = getattr(entry, "chunks", None)
        places = [()] if chunks is None else [tuple(chunk.offsets) for chunk in chunks]
        missing = [place for place in places if (name, place) not in stored]
        if missing or (chunks is not None and sum(math.prod(chunk.sizes) for chunk in chunks) < math.prod(entry.size)):
            raise ValueError(f"damaged: {METADATA} does not locate a part of {name}")


def read_index(path: Path) -> Any:
    """The index as `torch.distributed.checkpoint.metadata.Metadata`; ValueError if it names another class."""
    with open_regular(path, METADATA) as file:
        return _MetadataUnpickler(io.BytesIO(file.read())).load()
