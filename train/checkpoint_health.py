"""Which checkpoint of a run to continue from: the newest that is whole, ours, and executes no code when it is loaded.

found, problems = list_checkpoints(folder)            # by their manifests and file sizes; needs no other process
checkpoint = newest_intact(found, trust=False)        # by their content, on all ranks together
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.checkpoint import FORMAT, MANIFEST, Checkpoint, digest

METADATA = ".metadata"


def list_checkpoints(folder: Path) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints in a folder whose files are all there, oldest first, and what is wrong with each of the others."""
    found, problems = [], []
    for path in sorted(folder.glob("step-*")):
        try:
            found.append(read_manifest(path))
        except ValueError as error:
            problems.append(f"{path}: {error}")
    return sorted(found, key=lambda checkpoint: checkpoint.step), problems


def read_manifest(path: Path) -> Checkpoint:
    """A published checkpoint; ValueError if it is foreign, or a file is missing or has another size."""
    try:
        facts = json.loads((path / MANIFEST).read_text())
        files, step = dict(facts.pop("files")), int(facts["step"])
        sizes = {name: int(of_file["size"]) for name, of_file in files.items()}
        known = facts["format"] == FORMAT
    except FileNotFoundError as error:
        raise ValueError(f"foreign: no {MANIFEST}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged or foreign: {MANIFEST} cannot be read") from error
    if not known:
        raise ValueError(f"foreign: format {facts['format']}, not {FORMAT}")
    for name, expected in sizes.items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != expected:
            raise ValueError(
                f"damaged: {name} is missing" if size is None else f"damaged: {name} has {size} bytes, not {expected}"
            )
    return Checkpoint(path, step, facts, files)


def newest_intact(found: list[Checkpoint], *, trust: bool) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose content is as written, and what is wrong with newer ones; a collective on every rank.

    Ranks share the work of reading. trust: load pickled code, too.
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
        gathered: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, _problem_of_share(checkpoint, trust=trust))
        wrong = [problem for problem in gathered if problem is not None]
        if not wrong:
            return checkpoint, problems
        problems.append(f"{checkpoint.path}: {wrong[0]}")
    return None, problems


def _problem_of_share(checkpoint: Checkpoint, *, trust: bool) -> str | None:
    """What is wrong with the files that this rank looks at; never an exception, which would leave the others waiting."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        for name in sorted(checkpoint.files)[rank::ranks]:
            if digest(checkpoint.path / name) != checkpoint.files[name]:
                return f"damaged: the content of {name} is not what was written"
        if rank == 0 and not trust:
            check_executes_no_code(checkpoint.path)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"damaged: {type(error).__name__}: {error}"
    return None


# What Megatron-Core's and torch's own .metadata consists of.
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
    """ValueError if loading this checkpoint would execute code that it brings along.

    Its tensors cannot. What is pickled are the index of its tensors, which may name a few classes only, and objects,
    which must load with torch's weights_only.
    """
    refusal = "refused: {}; set checkpoint.trust=true if you know where it comes from"
    try:
        metadata = _MetadataUnpickler(io.BytesIO((path / METADATA).read_bytes())).load()
        for index, place in metadata.storage_data.items():
            if getattr(place, "transform_descriptors", None):
                raise ValueError("its files are transformed, which this check does not see through")
            if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata":
                with open(path / place.relative_path, "rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        torch.load(path / "common.pt", weights_only=True)
    except Exception as error:  # whatever a pickle that is not what it should be leads to
        raise ValueError(refusal.format(str(error).splitlines()[0])) from error
