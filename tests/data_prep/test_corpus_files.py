"""Files of a corpus: links, dataset cards, special files, and changes while it is read."""

import glob
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from data_prep import corpora
from data_prep.corpora import Corpus, CorpusConfig
from data_prep.errors import DataError
from data_prep.tokenize import TokenizeConfig, tokenize
from tests.data_prep.conftest import write_jsonl


def texts(path: object, **options: str) -> list[str]:
    return [record.text for record in Corpus(CorpusConfig(path=path, **options)).records()]


def test_each_file_is_read_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "sub", root / "sub2", elsewhere / "deep"):
        folder.mkdir(parents=True)
    for path in (root / "a", root / "sub/b", elsewhere / "c", elsewhere / "deep/d", tmp_path / "e"):
        write_jsonl(path.with_suffix(".jsonl"), [path.name])
    for number in range(5):  # without a record of where it was, the walk would take longer than the universe
        (root / f"back{number}").symlink_to(root)
        (root / f"sub/back{number}").symlink_to("..")
        (root / f"sub2/side{number}").symlink_to("../sub")
    (root / "other").symlink_to(elsewhere)
    (root / "sub/other").symlink_to(elsewhere / "deep")
    (root / "e.jsonl").symlink_to(tmp_path / "e.jsonl")
    (root / "z.jsonl").symlink_to("a.jsonl")
    everything = ["a", "e", "b", "c", "d"]
    assert sorted(texts(str(root))) == sorted(everything)
    for pattern in ("**/*.jsonl", "**", "**/*", "**/**/*.jsonl"):
        assert sorted(texts(str(root / pattern))) == sorted(everything)
    assert texts(str(root / "*.jsonl")) == ["a", "e"]
    assert texts(str(root / "**/other/*.jsonl")) == ["c", "d"]
    assert texts(str(root / "sub2/side0/*.jsonl")) == ["b"]
    assert texts([str(root / "z.jsonl"), str(root / "a.jsonl"), str(root / "sub/../a.jsonl")]) == ["a"]
    assert Corpus(CorpusConfig(path=str(root / "sub"))).files[0] == root / "sub/b.jsonl"


def test_hidden_files_are_read_by_their_names_only(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    for name in (".unfinished-a", ".cache/b", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    assert texts(str(tmp_path)) == texts(str(tmp_path / "**")) == ["c"]
    assert texts(str(tmp_path / ".cache")) == texts(str(tmp_path / ".c*/*")) == [".cache/b"]


def test_dataset_cards_are_left_out(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", ["text"])
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Card")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "picture.png").write_bytes(b"")
    assert texts(str(tmp_path)) == ["text"]
    assert texts(str(tmp_path / "[dR]*")) == texts(str(tmp_path / "*")) == texts(str(tmp_path / "**")) == ["text"]
    assert Corpus(CorpusConfig(path=str(tmp_path / "*"))).describe().endswith("no suffix of a text format): picture.png")
    with pytest.raises(DataError, match=r"corpus\.path=.*/p\*: no matching file has a suffix of text.*corpus\.format"):
        texts(str(tmp_path / "p*"))
    with pytest.raises(DataError, match=r"picture\.png: its suffix is not that of a format; set corpus\.format"):
        texts(str(tmp_path / "*.png"))
    assert texts([str(tmp_path), str(tmp_path / "README.md")]) == ["text", "---\nlicense: mit\n---\n# Card"]
    assert texts(str(tmp_path / "*.md")) == ["---\nlicense: mit\n---\n# Card"]
    (tmp_path / "manual").mkdir()
    for name in ("README.md", "guide.md"):
        (tmp_path / "manual" / name).write_text(name)
    assert texts(str(tmp_path / "manual")) == ["README.md", "guide.md"]


def test_a_folder_that_save_to_disk_wrote(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_dict({"text": [f"{name}{n}" for n in range(6)]}) for name in ("test", "train")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards={"train": 3, "test": 1})
    train = tmp_path / "saved/train"
    (train / "cache-0123.arrow").write_bytes((train / "data-00000-of-00003.arrow").read_bytes())
    assert texts(str(train)) == texts(str(train / "*")) == splits["train"]["text"][:]
    assert texts(str(tmp_path)) == splits["test"]["text"][:] + splits["train"]["text"][:]
    state = json.loads((train / "state.json").read_text())
    state["_data_files"].reverse()
    (train / "state.json").write_text(json.dumps(state))
    assert texts(str(train)) == ["train4", "train5", "train2", "train3", "train0", "train1"]
    (train / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: cannot be read \(No such file"):
        texts(str(tmp_path))


def test_another_state_json_is_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"text": "Ohio"}')
    assert texts(str(tmp_path)) == ["Ohio"]


def test_describe_lists_the_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "README.md", "c.txt.gz", "x.png", "y.png"):
        (tmp_path / name).write_bytes(b"x" * 500)
    assert Corpus(CorpusConfig(path=str(tmp_path), name="web")).describe() == (
        "web: 3 files (2 jsonl, 1 text.gz), 1.5 kB; left out 1 file (describes the data): README.md; "
        "left out 2 files (no suffix of a text format): x.png, y.png"
    )


@pytest.mark.parametrize("where", ["{0}/odd.jsonl", "{0}", "{0}/*.jsonl", "{0}/**"])
def test_special_files_are_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    path, odd = where.format("."), Path("odd.jsonl")
    os.mkfifo(odd)
    with pytest.raises(DataError, match=r"odd\.jsonl: a pipe, but a corpus is read more than once"):
        Corpus(CorpusConfig(path=path))
    odd.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("odd.jsonl")
        with pytest.raises(DataError, match=r"odd\.jsonl: a socket, not a text file"):
            Corpus(CorpusConfig(path=path))
    odd.unlink()
    odd.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"odd\.jsonl: a device, not a text file"):
        Corpus(CorpusConfig(path=path))
    for target in ("nowhere", "odd.jsonl"):
        odd.unlink()
        odd.symlink_to(target)
        with pytest.raises(DataError, match=r"odd\.jsonl: a broken link"):
            Corpus(CorpusConfig(path=path))


def test_the_output_of_a_command_is_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(DataError, match=rf"/dev/fd/{reader}: a pipe, but a corpus is read more than once"):
        Corpus(CorpusConfig(path=f"/dev/fd/{reader}", format="text"))
    os.close(reader)
    os.close(writer)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    write_jsonl(tmp_path / os.fsdecode(b"caf\xe9.jsonl"), ["text"])
    with pytest.raises(DataError, match=r"caf\\udce9\.jsonl': the name is not UTF-8"):
        Corpus(CorpusConfig(path=str(tmp_path)))


def grow(path: Path) -> None:
    with open(path, "a") as file:
        file.write('{"text": "more"}\n')


def write_elsewhere_and_rename(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes().upper())
    os.replace(path.with_name("new"), path)


def change_and_set_the_time_back(path: Path) -> None:
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"Document", b"DOCUMENT"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    r"b\.jsonl: changed \(\d+ bytes at the start, \d+ now\)": grow,
    r"b\.jsonl: changed \(\d+ bytes at the start, 40 now\)": lambda path: os.truncate(path, 40),
    r"b\.jsonl: changed \(written to or replaced\)": lambda path: path.write_bytes(path.read_bytes().upper()),
    r"b\.jsonl: changed \(written to or replaced\) ?": write_elsewhere_and_rename,
    r"b\.jsonl: changed \(different content\)": change_and_set_the_time_back,
    r"b\.jsonl: (removed|removed from the corpus)": Path.unlink,
    r"z\.jsonl: added to the corpus": lambda path: write_jsonl(path.with_name("z.jsonl"), ["new"]),
}


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.parametrize("behind", ["a", "b", "c"])
def test_a_corpus_that_changes_while_it_is_read_is_refused(
    options: Callable[..., TokenizeConfig], documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    message: str, behind: str,
) -> None:  # fmt: skip
    folder = tmp_path / "text"
    folder.mkdir()
    for number, name in enumerate("abc"):
        write_jsonl(folder / f"{name}.jsonl", documents[number * 100 : (number + 1) * 100])
    read = corpora.read_file

    def read_and_change(path: Path, *rest: object) -> object:
        for number, value in enumerate(read(path, *rest)):  # type: ignore[arg-type]
            if path.stem == behind and number == 50:
                CHANGES[message](folder / "b.jsonl")
            yield value

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "read_file", read_and_change)
        with pytest.raises(DataError, match=f"{message} while it was read"):
            tokenize(options({"path": str(folder)}))
    assert not (tmp_path / "shards/manifest.json").exists()
    with pytest.raises(DataError, match="shards: contains shards of another corpus"):
        tokenize(options({"path": str(folder)}))


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize(
    "path", ["{0}", "{0}/", "{0}/**", "{0}/**/*.json", "{0}/*/*", "[{0}/a.jsonl,{0}/**/p*]", "{1}", "."]
)
def test_shards_within_the_corpus_are_refused_before_anything_is_written(
    options: Callable[..., TokenizeConfig], documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:  # fmt: skip
    folder = tmp_path / "text[1]"
    (folder / "sub").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", documents)
    write_jsonl(folder / "sub/p.json", documents)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    escaped = str(folder) if path.startswith("{0}") and len(path) < 6 else glob.escape(str(folder))
    given = path.format(escaped if "*" in path else folder, tmp_path / "link")
    entries = given[1:-1].split(",") if given.startswith("[") else given
    for output in (folder / "shards", tmp_path / "link/shards"):
        with pytest.raises(DataError, match=r"output=.*shards is in the corpus: .* Choose a folder outside corpus\.path="):
            tokenize(options({"path": entries}, output=str(output)))
    assert not (folder / "shards").exists()


@pytest.mark.usefixtures("inline_pool")
@pytest.mark.parametrize(
    ("path", "output"), [("{0}/*.jsonl", "shards"), ("{0}", ".shards"), ("{0}/**/*.txt", "shards"), ("{0}/a.jsonl", "a")]
)
def test_shards_next_to_the_corpus_are_not_read(
    options: Callable[..., TokenizeConfig], documents: list[str], tmp_path: Path, path: str, output: str
) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "b.txt").write_text("\n\n".join(documents))
    assert tokenize(options({"path": path.format(tmp_path)}, output=str(tmp_path / output))).documents("train")


@pytest.mark.usefixtures("inline_pool")
def test_many_small_files_show_progress(
    options: Callable[..., TokenizeConfig], documents: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "text").mkdir()
    for number, text in enumerate(documents):
        write_jsonl(tmp_path / f"text/{number:03}.jsonl", [text])
    manifest = tokenize(options({"path": str(tmp_path / "text")}, progress_seconds=0))
    assert manifest.records == {"kept": 300}
    lines = caplog.messages
    assert lines[0].startswith("text: 300 files (300 jsonl), ")
    assert "text: ends of files hashed: 150 of 300" in lines
    assert any(line.startswith("text: file 150 of 300, ") and "%" in line for line in lines)
