"""Choose the checkpoint to continue from: the newest that is intact, fits the model, and executes no code on loading.

found, problems = list_checkpoints(folder)            # checks manifests and file sizes; not a collective
checkpoint, problems = newest_intact(found, trust=False)                              # checks the content of files
checkpoint, loaded, problems = load_newest(found, make_state, trust=False)            # also checks the fit, and loads

`newest_intact` and `load_newest` are collectives on every rank.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mone_common.text import excerpt
from train.checkpoint_fit import check_fits
from train.checkpoint_folder import COMMON, METADATA, Checkpoint, check_content, open_regular, read_manifest
from train.checkpoint_folder import list_checkpoints as list_checkpoints
from train.checkpoint_loading import load_checkpoint


def newest_intact(found: list[Checkpoint], *, trust: bool) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint with intact content, and the problems of newer ones; a collective on every rank.

    Each rank reads a part of the files. trust: accept pickled code.
    """
    problems: list[str] = []
    steps: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(steps, [checkpoint.step for checkpoint in found])
    if any(others != steps[0] for others in steps):
        raise RuntimeError(
            f"run.dir: rank {dist.get_rank()} sees checkpoints of steps {steps[dist.get_rank()]}, rank 0 of {steps[0]}; "
            "run.dir must be on a file system that all nodes share"
        )
    for checkpoint in reversed(found):
        # Check the content first: damage must not be reported as untrusted code, which invites the user to trust it.
        problem = _first(_problem_of_share(checkpoint)) or _first(None if trust else _problem_of_code(checkpoint))
        if problem is None:
            return checkpoint, problems
        problems.append(f"{checkpoint.path}: {problem}")
    return None, problems


def _first(mine: str | None) -> str | None:
    """The problem of the lowest rank that has one; a collective on every rank."""
    gathered: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return next((problem for problem in gathered if problem is not None), None)


def load_newest(
    found: list[Checkpoint],
    make_state: Callable[[], dict[str, Any]],
    *,
    trust: bool,
    whole: bool = True,
    same_layout: Callable[[Checkpoint], bool] = lambda checkpoint: False,
) -> tuple[Checkpoint | None, dict[str, Any], list[str]]:
    """Fill a sharded state from the newest checkpoint that is intact, fits the state, and holds only finite numbers.

    Returns the checkpoint, the filled state, and the problems of newer ones; a collective on every rank. make_state: creates
    the state to fill, once for each checkpoint that is tried. whole: the checkpoint must hold nothing else. same_layout:
    whether to restore the random generators from a checkpoint.
    """
    problems: list[str] = []
    while found:
        checkpoint, more = newest_intact(found, trust=trust)
        problems += more
        if checkpoint is None:
            break
        try:
            state = make_state()
            check_fits(checkpoint, state, whole=whole)
            return checkpoint, load_checkpoint(checkpoint, state, same_layout=same_layout(checkpoint)), problems
        except ValueError as error:  # raised on every rank
            problems.append(f"{checkpoint.path}: {error}")
        found = found[: found.index(checkpoint)]
    return None, {}, problems


def _problem_of_share(checkpoint: Checkpoint) -> str | None:
    """A problem in the content of this rank's share of the files, or None."""
    rank, ranks = dist.get_rank(), dist.get_world_size()

    def check() -> None:
        for name in sorted(checkpoint.files)[rank::ranks]:
            check_content(checkpoint, name)

    return _problem(check)


def _problem_of_code(checkpoint: Checkpoint) -> str | None:
    """A problem in the pickled data, or None. Only rank 0 checks."""

    def check() -> None:
        check_executes_no_code(checkpoint.path)
        check_index(checkpoint)

    return _problem(check) if dist.get_rank() == 0 else None


def _problem(check: Callable[[], None]) -> str | None:
    """The error of a check as text, or None. Does not raise, since that would leave the other ranks waiting."""
    try:
        check()
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"damaged: {type(error).__name__}: {excerpt(error)}"
    return None


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
        metadata = _read_index(path)
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
    metadata = _read_index(checkpoint.path)
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


def _read_index(path: Path) -> Any:
    with open_regular(path, METADATA) as file:
        return _MetadataUnpickler(io.BytesIO(file.read())).load()
