"""The checkpoint folder: a loadable checkpoint always remains, and entries of others are kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mone_common import checkpoint_folder
from mone_common.checkpoint_folder import (
    BACKEND,
    COMMON,
    MANIFEST,
    METADATA,
    free_name,
    list_checkpoints,
    name_of,
    prune,
    publish,
    read_manifest,
    remove_leftovers,
)

RUN, OTHER = "ours", "another"


def save(folder: Path, step: int, *, run: str | None = RUN, **how: Any) -> list[str]:
    """Publish a checkpoint with files of a few bytes, like a run."""
    notes = remove_leftovers(folder)
    unfinished = free_name(folder / f".unfinished-{name_of(step)}")
    unfinished.mkdir(parents=True)
    for name in (METADATA, COMMON, BACKEND, "__0_0.distcp"):
        (unfinished / name).write_text(f"{name} of {run} at step {step}")
    _, more = publish(unfinished, step=step, noted={"run": run})
    return notes + more + prune(folder, step=step, run=run, **{"keep_last": 2} | how)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which these tests do not need."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def steps_in(folder: Path, run: str | None = RUN) -> list[int]:
    found, _ = list_checkpoints(folder, run=run)
    return [checkpoint.step for checkpoint in found]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a run's checkpoints of steps 2 and 4."""
    folder = tmp_path / "checkpoints"
    for step in (2, 4):
        save(folder, step)
    return folder


def write_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / MANIFEST).read_text()) | changes
    (path / MANIFEST).write_text(json.dumps(manifest))


def name_a_file(path: Path, name: str, size: int = 1) -> None:
    files = json.loads((path / MANIFEST).read_text())["files"]
    write_manifest(path, files=files | {name: {"size": size, "sha256": "0" * 64}})


def replace_manifest(path: Path, make: Callable[[Path], Any]) -> None:
    (path / MANIFEST).unlink()
    make(path / MANIFEST)


def both(first: Callable[[Path], Any], second: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Run several changes in sequence."""
    return lambda path: [act(path) for act in (first, second)]


ODD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a manifest that is a folder": (lambda path: replace_manifest(path, Path.mkdir), "not a regular file"),
    "a manifest that is a pipe": (lambda path: replace_manifest(path, os.mkfifo), "not a regular file"),
    "a manifest that is a link": (
        lambda path: replace_manifest(path, lambda name: name.symlink_to(path.parent / name_of(4) / MANIFEST)),
        "mone.json cannot be read",
    ),
    "a manifest that links to itself": (
        lambda path: replace_manifest(path, lambda name: name.symlink_to(name)),
        "cannot be",
    ),
    "a manifest nested deeply": (lambda path: (path / MANIFEST).write_text('{"a":' + "[" * 10**6), "nested too deeply"),
    "a manifest with an endless number": (
        lambda path: (path / MANIFEST).write_text('{"step": ' + "9" * 5000),
        "cannot be read",
    ),
    "a manifest that is a number": (lambda path: (path / MANIFEST).write_text("6"), "not a JSON object"),
    "a manifest larger than any": (lambda path: os.truncate(path / MANIFEST, 2**40), "larger than"),
    "a step that is true": (lambda path: write_manifest(path, step=True), "cannot be read"),
    "a step of another name": (lambda path: write_manifest(path, step=7), "its name does not match the step"),
    "a step below zero": (lambda path: write_manifest(path, step=-6), "cannot be read"),
    "no files": (lambda path: write_manifest(path, files={}), "does not list .metadata, metadata.json"),
    "files that are text": (lambda path: write_manifest(path, files="all"), "cannot be read"),
    "a size that is text": (lambda path: name_a_file(path, "more", size="1"), "cannot be read"),  # type: ignore[arg-type]
    "a digest that is a number": (
        lambda path: write_manifest(path, files={"a": {"size": 1, "sha256": 1}}),
        "cannot be read",
    ),
    "a file name of 5000 characters": (lambda path: name_a_file(path, "a" * 5000), "cannot be read"),
    "a file name with a null": (lambda path: name_a_file(path, "a\0b"), "not a file name"),
    "a file name of half a character": (lambda path: name_a_file(path, "\ud800"), "cannot be read"),
    "a file without a name": (lambda path: name_a_file(path, ""), "not a file name"),
    "the folder itself as a file": (lambda path: name_a_file(path, "."), "not a file name"),
    "an absolute file": (lambda path: name_a_file(path, "/dev/zero"), "not a file name"),
    "a file of the folder above": (lambda path: name_a_file(path, f"../{name_of(4)}/{COMMON}"), "not a file name"),
    "a file that is a folder": (
        both(lambda path: (path / "more").mkdir(), lambda path: name_a_file(path, "more")),
        "more is not a regular file",
    ),
    "a file that is a pipe": (
        both(lambda path: os.mkfifo(path / "more"), lambda path: name_a_file(path, "more")),
        "more is not a regular file",
    ),
    "a file that is a link to a device": (
        both(lambda path: (path / "more").symlink_to("/dev/zero"), lambda path: name_a_file(path, "more")),
        "more cannot be read",
    ),
    "a file that is a link to a right one": (
        both(lambda path: (path / COMMON).rename(path / "away"), lambda path: (path / COMMON).symlink_to("away")),
        "common.pt cannot be read",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_invalid_checkpoint_is_reported_and_skipped(folder: Path, kind: str) -> None:
    save(folder, 6)
    spoil, message = ODD[kind]
    spoil(folder / name_of(6))
    found, problems = list_checkpoints(folder)
    assert [checkpoint.step for checkpoint in found] == [4]
    assert len(problems) == 1
    assert problems[0].startswith(str(folder / name_of(6)))
    assert message in problems[0]
    assert len(problems[0]) < 600


def test_other_entries_are_reported_and_not_changed(folder: Path, tmp_path: Path) -> None:
    (folder / "step-00000006.tar").write_text("packed")
    (folder / "step-00000007").write_text("a file")
    (folder / "step-loop").symlink_to("step-loop")
    (folder / "step-00000008").symlink_to("step-00000008")
    (folder / "step-00000009").symlink_to(tmp_path / "nowhere")
    shutil.copytree(folder / name_of(2), folder / "step-best")
    shutil.copytree(folder / name_of(2), folder / "step-00000002.bak")
    shutil.copytree(folder / name_of(2), folder / "step-00000001")
    os.mkfifo(folder / "step-00000010")
    (folder / os.fsdecode(b"step-\xff\x1b[2J")).mkdir()
    odd = set(names_in(folder)) - {name_of(2), name_of(4)}
    found, problems = list_checkpoints(folder)
    assert [checkpoint.step for checkpoint in found] == [2, 4]
    assert len(problems) == len(odd)
    assert all(problem.isprintable() and problem.isascii() for problem in problems)
    for step in (6, 11, 12):
        save(folder, step, keep_last=1)
    assert odd < set(names_in(folder))
    assert steps_in(folder) == [12]


@pytest.mark.parametrize("kind", ["a link to nowhere", "a file", "a link to itself"])
def test_an_unreadable_folder_is_a_problem(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoints"
    if kind == "a file":
        folder.write_text("")
    else:
        folder.symlink_to(tmp_path / "unmounted" if kind == "a link to nowhere" else folder)
    found, problems = list_checkpoints(folder)
    assert found == []
    assert len(problems) == 1
    assert str(folder) in problems[0]
    assert list_checkpoints(tmp_path / "none") == ([], [])


def test_a_linked_folder_of_checkpoints_works(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    save(link, 6)
    assert steps_in(link) == steps_in(folder) == [4, 6]


def test_a_linked_checkpoint_loads_and_is_not_deleted(folder: Path, tmp_path: Path) -> None:
    (folder / name_of(2)).rename(tmp_path / "elsewhere")
    (folder / name_of(2)).symlink_to(tmp_path / "elsewhere")
    assert steps_in(folder) == [2, 4]
    for step in (6, 8):
        assert save(folder, step) == []
    assert steps_in(folder) == [2, 6, 8]
    assert (tmp_path / "elsewhere" / MANIFEST).exists()
    save(folder, 2)
    assert not (folder / name_of(2)).is_symlink()
    assert (folder / f"replaced-{name_of(2)}" / MANIFEST).exists()


def test_checkpoints_of_another_run_are_neither_listed_nor_deleted(folder: Path) -> None:
    save(folder, 3, run=OTHER, keep_last=9)
    save(folder, 5, run=None, keep_last=9)  # of a version without run ids
    found, problems = list_checkpoints(folder, run=RUN)
    assert [checkpoint.step for checkpoint in found] == [2, 4, 5]
    assert len(problems) == 1
    assert f"{folder / name_of(3)}: foreign: it belongs to the run with id another" in problems[0]
    for step in (6, 8):
        save(folder, step, keep_last=1)
    assert names_in(folder) == [name_of(step) for step in (3, 5, 8)]


def test_the_new_checkpoint_and_the_one_resumed_from_are_never_deleted(folder: Path) -> None:
    for step in (6, 8, 10):
        save(folder, step, keep_last=9)
    (folder / name_of(10) / COMMON).unlink()
    # 10 is damaged, 6 and 8 cannot be used: the run continued from 4.
    save(folder, 5, keep_last=1, spared=[4], uncounted=[6, 8])
    assert steps_in(folder) == [4, 5, 6, 8]
    assert (folder / name_of(10)).exists()
    save(folder, 7, keep_last=1, spared=[4], uncounted=[6, 8])
    assert steps_in(folder) == [4, 6, 7, 8]


def test_an_entry_with_the_name_of_a_checkpoint_is_renamed(folder: Path) -> None:
    for number in (1, 2):
        (folder / name_of(6)).mkdir()
        (folder / name_of(6) / "notes").write_text(f"precious {number}")
        notes = save(folder, 6)
        aside = f"replaced-{name_of(6)}" + ("" if number == 1 else ".2")
        assert len(notes) == 1
        assert aside in notes[0]
        assert (folder / aside / "notes").read_text() == f"precious {number}"
        assert read_manifest(folder / name_of(6)).step == 6
        shutil.rmtree(folder / name_of(6))
    save(folder, 8)
    (folder / name_of(8) / COMMON).write_text("")
    assert "is kept as" in save(folder, 8)[0]  # damaged, but ours
    assert save(folder, 8) == []  # complete and ours
    assert steps_in(folder) == [4, 8]


def test_leftovers_that_cannot_be_removed_are_reported_and_do_no_harm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".unfinished-step-00000006").mkdir()
    (folder / ".unfinished-delete-step-00000002").symlink_to(folder / name_of(2))
    remove = shutil.rmtree

    def stuck(path: Path, *args: Any) -> None:
        if "unfinished-delete" not in str(path) and path.name != ".unfinished-step-00000006":
            remove(path, *args)
        else:
            raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_folder.shutil, "rmtree", stuck)
        notes = save(folder, 6)
        assert [name for name in (".unfinished-step-00000006", ".unfinished-delete-step-00000002") if name in str(notes)]
        assert "busy" in str(notes)
        assert steps_in(folder) == [4, 6]
        save(folder, 8)
        assert steps_in(folder) == [6, 8]
    save(folder, 10)
    assert [name for name in names_in(folder) if name.startswith(".unfinished")] == [".unfinished-delete-step-00000002"]


STEPS = st.integers(1, 12)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(1, 4), st.integers(1, 3)),
        st.tuples(st.just("damage"), STEPS, st.sampled_from(["truncate", "no manifest", "content", "empty"])),
        st.tuples(st.just("copy"), STEPS, st.sampled_from(["step-best", "step-{:08d}.bak", "step-{}", "step-00000099"])),
        st.tuples(st.just("link"), STEPS, st.just(0)),
        st.tuples(st.just("foreign"), STEPS, st.sampled_from([OTHER, None])),
        st.tuples(st.just("killed"), STEPS, st.booleans()),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, keep_last=st.integers(1, 3), keep_every=st.sampled_from([None, 4]))
def test_after_any_fault_a_checkpoint_loads_and_the_run_continues(
    tmp_path_factory: pytest.TempPathFactory, actions: list[Any], keep_last: int, keep_every: int | None
) -> None:
    """Saves, damage, copies, links, checkpoints of other runs and kills in any order."""
    folder = tmp_path_factory.mktemp("property")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    good: set[int] = set()
    """Steps of checkpoints with the content that this run wrote."""
    precious: dict[Path, str] = {}
    for number, (action, first, second) in enumerate(actions):
        path = folder / name_of(first)
        if action == "train":  # resume, and save a few times
            found, _ = list_checkpoints(folder, run=RUN)
            usable = [checkpoint for checkpoint in found if intact(checkpoint.path)]
            at = usable[-1].step if usable else 0
            passed = {checkpoint.step for checkpoint in found if checkpoint.step > at}
            for _ in range(first):
                at += second
                save(
                    folder,
                    at,
                    keep_last=keep_last,
                    keep_every=keep_every,
                    spared=[usable[-1].step] if usable else [],
                    uncounted=passed - {at},
                )
                good = {step for step in {*good, at} if intact(folder / name_of(step))}
                assert at in good, "the checkpoint just published"
                if usable:
                    assert intact(usable[-1].path), "the checkpoint resumed from"
        elif action == "damage" and intact(path) and len(good) > 1 and not path.is_symlink():
            spoil(path, second)
            good.discard(first)
            precious[path] = ""
        elif action == "copy" and intact(path):
            name = second.format(first)
            if not os.path.lexists(folder / name):
                shutil.copytree(path, folder / name)
                precious[folder / name] = (path / COMMON).read_text()
        elif action == "link" and intact(path) and not path.is_symlink():
            path.rename(elsewhere / str(number))
            path.symlink_to(elsewhere / str(number))
            precious[elsewhere / str(number)] = (path / COMMON).read_text()
        elif action == "foreign" and not os.path.lexists(path):
            save(folder, first, run=second, keep_last=99)
            precious[path] = (path / COMMON).read_text()
        elif action == "killed":
            (folder / f".unfinished-{'delete-' if second else ''}{name_of(first)}").mkdir(exist_ok=True)
        found, _ = list_checkpoints(folder, run=RUN)
        assert not good or any(intact(checkpoint.path) for checkpoint in found)
    for path, content in precious.items():
        kept = [path, *folder.glob(f"replaced-{path.name}*")]
        assert any(not content or (each / COMMON).exists() and (each / COMMON).read_text() == content for each in kept), path


def intact(path: Path) -> bool:
    """Whether a checkpoint has the content that `save` wrote."""
    try:
        checkpoint = read_manifest(path)
        for name in checkpoint.files:
            checkpoint_folder.check_content(checkpoint, name)
    except ValueError:
        return False
    return checkpoint.noted["run"] in (RUN, None)


def spoil(path: Path, how: str) -> None:
    match how:
        case "truncate":
            os.truncate(path / COMMON, 1)
        case "no manifest":
            (path / MANIFEST).unlink()
        case "content":
            (path / COMMON).write_text((path / COMMON).read_text()[::-1])
        case "empty":
            shutil.rmtree(path)
            path.mkdir()
