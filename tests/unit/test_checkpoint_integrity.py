"""Damaged, foreign and unsafe checkpoints are reported and skipped; a failed save leaves nothing behind."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_common_state_dict

from mone_common.checkpoint_folder import MANIFEST, METADATA, Checkpoint, digest
from mone_common.checkpoint_index import check_executes_no_code
from tests.tiny import facts_of
from train import checkpoint, checkpoint_private
from train.checkpoint import SaveFailed, Saver, find_not_finite
from train.checkpoint_facts import read_facts
from train.checkpoint_integrity import list_checkpoints, newest_intact
from train.checkpoint_loading import load_checkpoint
from train.config_sections import CheckpointConfig

pytestmark = pytest.mark.usefixtures("one_process")


class Dangerous:
    """An object whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.marker), 0o777, True)  # Megatron-Core 0.19 reads an index twice


def state_of(value: float, **objects: Any) -> dict[str, Any]:
    weight = ShardedTensor.from_rank_offsets("weight", torch.full((64, 8), value))
    return {"weight": weight} | {name: ShardedObject(name, thing, (1,), (0,)) for name, thing in objects.items()}


def save(folder: Path, step: int, state: dict[str, Any] | None = None, *, async_save: bool = False) -> Path:
    saver = Saver(folder, CheckpointConfig(keep_last=9, async_save=async_save))
    saver.save(step=step, state=state or state_of(float(step)), facts=facts_of(step))
    saved = saver.finish(wait=True)
    assert saved is not None
    return saved.path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a run's checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


def choose(folder: Path, *, trust: bool = False) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, and the problems of the others."""
    found, problems = list_checkpoints(folder)
    newest, more = newest_intact(found, trust=trust)
    return newest, problems + more


def tensors_of(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = path / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing file": (lambda path: tensors_of(path).unlink(), r"damaged: __0_\d.distcp is missing"),
    "missing metadata": (lambda path: (path / METADATA).unlink(), r"damaged: .metadata is missing"),
    "a truncated file": (lambda path: os.truncate(tensors_of(path), 100), r"damaged: __0_\d.distcp has 100 bytes, not \d+"),
    "a flipped byte": (
        lambda path: flip_a_byte(tensors_of(path)),
        r"damaged: the content of __0_\d.distcp does not match its sha256",
    ),
    "a flipped byte in the metadata": (
        lambda path: flip_a_byte(path / METADATA),
        r"damaged: the content of .metadata does not match its sha256",
    ),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "foreign: no mone.json"),
    "a garbled manifest": (lambda path: (path / MANIFEST).write_text('{"step": 2, '), "mone.json cannot be read"),
    "a manifest of bytes": (lambda path: (path / MANIFEST).write_bytes(b"\xff\xfe\x00"), "mone.json cannot be read"),
    "a manifest that is a list": (lambda path: (path / MANIFEST).write_text("[]"), "mone.json cannot be read"),
    "a manifest whose files are a list": (lambda path: edit_manifest(path, files=["a"]), "mone.json cannot be read"),
    "a manifest whose step is no number": (lambda path: edit_manifest(path, step="two"), "mone.json cannot be read"),
    "an older format": (
        lambda path: edit_manifest(path, format="mone-checkpoint-1"),
        "foreign: format mone-checkpoint-1, not mone-checkpoint-3",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_chosen(folder: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(folder / "step-00000002")
    newest, problems = choose(folder)
    assert newest is not None
    assert newest.step == 1
    assert len(problems) == 1
    assert problems[0].startswith(str(folder / "step-00000002"))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problems[0])
    loaded = load_checkpoint(newest, state_of(0.0), same_layout=True)
    assert torch.equal(loaded["weight"], torch.full((64, 8), 1.0))


def test_the_newest_of_intact_checkpoints_is_chosen(folder: Path) -> None:
    newest, problems = choose(folder)
    assert newest is not None
    assert newest.step == 2
    assert read_facts(newest) == facts_of(2)
    assert problems == []


def test_a_shadowing_folder_is_reported_and_others_are_ignored(folder: Path) -> None:
    (folder / "step-00000003").mkdir()
    (folder / "step-00000003" / "weights.pt").write_bytes(b"0")
    (folder / "notes").mkdir()
    newest, problems = choose(folder)
    assert newest is not None
    assert newest.step == 2
    assert problems == [f"{folder / 'step-00000003'}: foreign: no mone.json"]


def test_no_intact_checkpoint(folder: Path) -> None:
    for path in folder.iterdir():
        flip_a_byte(tensors_of(path))
    newest, problems = choose(folder)
    assert newest is None
    assert len(problems) == 2


def bring_code_in_an_object(folder: Path, marker: Path) -> None:
    save(folder, 3, state_of(3.0, brought=Dangerous(marker)))


def bring_code_in_the_metadata(folder: Path, marker: Path) -> None:
    replace_pickle(save(folder, 3), METADATA, marker)


def bring_code_in_common_pt(folder: Path, marker: Path) -> None:
    replace_pickle(save(folder, 3), "common.pt", marker)


def replace_pickle(path: Path, name: str, marker: Path) -> None:
    """Put code into one file of a checkpoint, and update the manifest."""
    if name == METADATA:
        metadata = pickle.loads((path / METADATA).read_bytes())
        metadata.planner_data = Dangerous(marker)
        (path / METADATA).write_bytes(pickle.dumps(metadata))
    else:
        common = load_common_state_dict(str(path))
        torch.save(common | {"brought": Dangerous(marker)}, path / name)
    files = json.loads((path / MANIFEST).read_text())["files"]
    edit_manifest(path, files=files | {name: digest(path / name)})


BRINGING = [bring_code_in_an_object, bring_code_in_the_metadata, bring_code_in_common_pt]


@pytest.mark.parametrize("bring", BRINGING)
def test_a_checkpoint_with_code_is_refused_without_executing_it(
    folder: Path, tmp_path: Path, bring: Callable[[Path, Path], None]
) -> None:
    marker = tmp_path / "executed"
    bring(folder, marker)
    newest, problems = choose(folder)
    assert not marker.exists()
    assert newest is not None
    assert newest.step == 2
    assert len(problems) == 1
    assert str(folder / "step-00000003") in problems[0]
    assert "refused" in problems[0]
    assert "checkpoint.trust=true" in problems[0]


# Code in common.pt is never executed, since Megatron-Core loads it with weights_only.
@pytest.mark.parametrize("bring", [bring_code_in_an_object, bring_code_in_the_metadata])
def test_a_trusted_checkpoint_is_loaded_with_its_code(
    folder: Path, tmp_path: Path, bring: Callable[[Path, Path], None]
) -> None:
    marker = tmp_path / "executed"
    bring(folder, marker)
    newest, problems = choose(folder, trust=True)
    assert newest is not None
    assert newest.step == 3
    assert problems == []
    more = {"brought": None} if bring is bring_code_in_an_object else {}
    loaded = load_checkpoint(newest, state_of(0.0, **more), same_layout=True)
    assert marker.exists()
    assert torch.equal(loaded["weight"], torch.full((64, 8), 3.0))


def test_saved_checkpoints_execute_no_code(folder: Path) -> None:
    check_executes_no_code(folder / "step-00000002")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_without_disk_space_fails_and_keeps_older_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool
) -> None:
    def nearly_full(path: Any) -> Any:
        return shutil._ntuple_diskusage(10**9, 10**9 - 100, 100)

    saver = Saver(folder, CheckpointConfig(keep_last=1, async_save=async_save))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", nearly_full)
        with pytest.raises(SaveFailed, match="are free, about"):
            saver.save(step=3, state=state_of(3.0), facts=facts_of(3))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert saver.finish(wait=True) is None
    assert choose(folder)[0] is not None

    # The next save has space again.
    saver.save(step=4, state=state_of(4.0), facts=facts_of(4))
    assert saver.finish(wait=True) is not None
    assert [path.name for path in folder.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_non_finite_state_is_reported_and_not_saved(folder: Path, dtype: torch.dtype, value: float) -> None:
    state = {"count": torch.ones(3, dtype=torch.int64), "none": torch.ones(0), "fine": torch.full((4, 4), 3e4, dtype=dtype)}
    assert find_not_finite(state) is None
    state["fine"][2, 3] = value
    assert find_not_finite({"model": [state]}) == "model.0.fine"
    saver = Saver(folder, CheckpointConfig())
    with pytest.raises(SaveFailed, match="weight is not finite, and not saved"):
        saver.save(step=3, state={"weight": ShardedTensor.from_rank_offsets("weight", state["fine"])}, facts=facts_of(3))
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert saver.finish(wait=True) is None


def test_a_save_after_a_killed_collecting_process_succeeds(folder: Path) -> None:
    for async_save in (False, True):
        saver = Saver(folder, CheckpointConfig(async_save=async_save))
        saver.save(step=3, state=state_of(3.0), facts=facts_of(3))
        assert saver.finish(wait=True) is not None
        kill_collector()
        saver.save(step=4, state=state_of(4.0), facts=facts_of(4))
        assert saver.finish(wait=True) is not None, "the process was started again"
        assert choose(folder)[0] is not None


@pytest.mark.parametrize("async_save", [False, True])
def test_a_killed_collecting_process_fails_the_save(folder: Path, monkeypatch: pytest.MonkeyPatch, async_save: bool) -> None:
    write = checkpoint._write_and_digest

    def write_and_lose(*args: Any, **kwargs: Any) -> None:
        kill_collector()
        write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_and_digest", write_and_lose)
        with pytest.raises(SaveFailed, match="the process that collects results has ended"):
            save(folder, 3, async_save=async_save)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    save(folder, 4, async_save=async_save)


def kill_collector() -> None:
    """Kill -9 the process that collects results of writers."""
    manager = checkpoint_private._manager
    assert manager is not None
    process = manager._process  # type: ignore[attr-defined]
    process.kill()
    process.join()
