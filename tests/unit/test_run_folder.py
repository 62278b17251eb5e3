"""Folders that a run can use."""

from pathlib import Path

import pytest

from mone_common.run_folder import check_free


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.yaml", "environment.json"):
        (folder / name).touch()
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a run, a sweep of one point and a queued job; the home folder is elsewhere."""
    here = tmp_path / "work"
    make_run(here / "runs/one")
    make_run(here / "runs/sweep/seed=1")
    (here / "runs/queued/launch").mkdir(parents=True)
    (here / "runs/queued/launch/frozen.yaml").touch()
    make_run(here / "others/deep/run")
    (here / "file").touch()
    (here / "loop").symlink_to("loop")
    (here / "link").symlink_to("runs")
    (tmp_path / "home/me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        (".", "is the current or the home folder"),
        ("runs/..", "is the current or the home folder"),
        ("..", "is the current or the home folder, or one above them"),
        ("/", "is the current or the home folder, or one above them"),
        ("../home/me", "is the current or the home folder"),
        ("../home", "or one above them"),
        ("runs", "is the folder that contains all runs"),
        ("runs/", "is the folder that contains all runs"),
        ("link", "is the folder that contains all runs"),
        ("runs/sweep", "holds other runs, such as"),
        ("others", "holds other runs, such as"),
        ("runs/one/checkpoints", "is within the run"),
        ("runs/queued/launch", "is within the run"),
        ("link/one/x/y", "is within the run"),
        ("file", "file is not a folder"),
        ("file/run", "file is not a folder"),
        ("loop", "loop is not a folder"),
        ("runs/" + "x" * 300, "cannot be a folder (File name too long)"),
    ],
)
def test_folders_that_a_run_cannot_use(folder: str, problem: str) -> None:
    with pytest.raises(ValueError, match=r"^run\.dir=.*; give another folder, e\.g\. run\.dir=runs/mine$") as error:
        check_free(Path(folder))
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "folder", ["runs/new", "runs/one", "runs/queued", "runs/sweep/seed=1", "runs/sweep/seed=2", "new/a/b"]
)
def test_new_folders_and_those_of_runs_are_free(folder: str) -> None:
    check_free(Path(folder))


def test_a_folder_with_other_files_is_free(here: Path) -> None:
    (here / "notes").mkdir()
    (here / "notes/config.yaml").touch()
    check_free(Path("notes"))
    check_free(Path("notes/run"))


def test_a_run_in_the_current_folder_can_resume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here / "runs/one")
    check_free(Path())


@pytest.mark.parametrize("folder", ["runs/sweep", "runs/another"])
def test_a_sweep_joins_its_earlier_runs(folder: str) -> None:
    check_free(Path(folder), sweep=True)


@pytest.mark.parametrize("folder", [".", "/", "runs/one/points", "file"])
def test_folders_that_a_sweep_cannot_use(folder: str) -> None:
    with pytest.raises(ValueError, match=r"^run\.dir="):
        check_free(Path(folder), sweep=True)
