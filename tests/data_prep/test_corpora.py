"""Texts and order of `corpora`, and its errors for unreadable input."""

import gzip
import json
import socket
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from data_prep.corpora import Corpus, CorpusConfig
from data_prep.errors import DataError
from data_prep.readers import read_file, read_hub
from data_prep.text_files import INVALID
from tests.data_prep.conftest import write_jsonl

TEXTS = ["One, two.\nThree", 'quoted "four"', "NA", "007", "Ünïcödé ▁ 漢字 🙂", "last"]


def kept(path: Any, **options: Any) -> list[str]:
    """Texts of the records that are kept."""
    return [r.text for r in Corpus(CorpusConfig(path=path, **options)).records() if r.text]


def write(folder: Path, suffix: str) -> Path:
    """TEXTS in the format of `suffix`."""
    path = folder / f"corpus{suffix}"
    table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    format, _, compression = suffix[1:].lower().partition(".")
    if format == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif format == "arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        if format in ("csv", "tsv"):
            text = table.to_pandas().to_csv(index=False, sep="," if format == "csv" else "\t")
        elif format == "json":
            text = json.dumps(table.to_pylist(), indent=1)
        elif format == "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
        else:
            text = "\n\n".join(TEXTS)
        path.write_bytes(gzip.compress(text.encode()) if compression else text.encode())
    return path


SUFFIXES = [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"]


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".JSONL.GZ"])
def test_every_format_gives_the_same_texts(tmp_path: Path, suffix: str) -> None:
    quoting = "minimal" if suffix == ".tsv" else None  # as pandas writes it
    assert kept(str(write(tmp_path, suffix)), quoting=quoting) == TEXTS


@pytest.mark.parametrize(("sample_by", "count"), [("line", 4), ("paragraph", 2), ("document", 1)])
def test_plain_text_is_split_by_sample_by(tmp_path: Path, sample_by: str, count: int) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\nfour\n")
    assert len(kept(str(tmp_path), sample_by=sample_by)) == count


@given(st.lists(st.sampled_from(["a", "b ", "\n", "\n\n", "\r\n", "\r", "\u2028"]), max_size=40).map("".join))
@settings(max_examples=100, deadline=None)
def test_paragraphs_end_at_empty_lines(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "a.txt"
    path.write_bytes(text.encode())
    paragraphs = text.replace("\r\n", "\n").replace("\r", "\n").split("\n\n")
    assert list(read_file(path, "text", "text")) == [paragraph for paragraph in paragraphs if paragraph]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('[{"text": "a"}, {"text": "b"}]', ["a", "b"]),
        ('\n[\n {"text": "a"},\n {"id": 7, "text": "b"}\n]\n', ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ('{"text": "a"}\n\n{"id": 7, "text": "b"}\n', ["a", "b"]),
        ('{\n "text": "a"\n}\n{\n "text": "b"\n}', ["a", "b"]),
        ('{"text": "a"}', ["a"]),
        ("[]", []),
        (" \n", []),
    ],
)
def test_json_is_an_array_or_objects(tmp_path: Path, content: str, texts: list[str]) -> None:
    (tmp_path / "a.json").write_text(content)
    assert kept(str(tmp_path)) == texts


def test_records_of_a_file_may_have_different_fields(tmp_path: Path) -> None:
    lines = [{"text": "a", "meta": {"x": 1}}, {"text": "b", "meta": "none"}, {"url": 3, "text": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert kept(str(tmp_path)) == ["a", "b", "c"]


def test_order_is_that_of_the_entries_and_sorted_within(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c", "[d]"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", [name])
    (tmp_path / "ignored.bin").write_text("no text")
    assert kept(str(tmp_path)) == ["[d]", "a", "b", "sub/c"]
    assert kept(str(tmp_path / "?.jsonl")) == ["a", "b"]
    assert kept(str(tmp_path / "**" / "*.jsonl")) == ["[d]", "a", "b", "sub/c"]
    assert kept([str(tmp_path / "b.jsonl"), str(tmp_path)]) == ["b", "[d]", "a", "sub/c"]
    assert kept(str(tmp_path / "[d].jsonl")) == ["[d]"]


def test_files_are_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name looked up"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("load_dataset counts loads at the hub"))
    for suffix in SUFFIXES:
        write(tmp_path, suffix)
    assert kept(str(tmp_path), quoting="minimal") == TEXTS * len(SUFFIXES)


def test_a_dataset_that_load_dataset_finds_by_itself(tmp_path: Path) -> None:
    write(tmp_path, ".parquet")  # a local folder goes the way of a hub id
    corpus = Corpus(CorpusConfig(hub=str(tmp_path)))
    assert [record.text for record in corpus.records()] == TEXTS
    assert corpus.files == []


def test_one_split_of_one_subset_is_read(tmp_path: Path) -> None:
    for subset in ("en", "de"):
        for split in ("train", "test"):
            write_jsonl(tmp_path / f"{subset}-{split}.jsonl", [f"{subset} {split} {n}" for n in range(1500)])
    entries = "".join(
        f"- config_name: {subset}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {subset}-{split}.jsonl\n" for split in ("train", "test"))
        for subset in ("en", "de")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    assert list(read_hub(str(tmp_path), "de", "test", None, "text")) == [f"de test {n}" for n in range(1500)]
    assert list(read_hub(str(tmp_path), "en", "train", None, "id")) == list(range(1500))
    with pytest.raises(DataError, match="no field 'words'.*id, text"):
        next(read_hub(str(tmp_path), "en", "train", None, "words"))
    with pytest.raises(ValueError, match="Config name is missing"):
        next(read_hub(str(tmp_path), None, "train", None, "text"))


def test_a_dataset_of_the_hub_is_streamed_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*args: Any, **options: Any) -> datasets.IterableDataset:
        asked.append((args, options))
        return datasets.Dataset.from_dict({"text": [*TEXTS, None]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = Corpus(CorpusConfig(hub="some/set", subset="en", split="test", revision="abc123"))
    records = list(corpus.records())
    assert [record.text for record in records] == [*TEXTS, ""]
    assert list(corpus.records(start=records[1].next)) == records[2:]
    assert asked == [(("some/set", "en"), {"split": "test", "revision": "abc123", "streaming": True})] * 2


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=30), st.data())
@settings(max_examples=25, deadline=None)
def test_reading_can_start_after_any_record(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: SearchStrategy[Any]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    cut = data.draw(st.integers(0, len(texts)))  # type: ignore[attr-defined]
    write_jsonl(folder / "a.jsonl", texts[:cut])
    write_jsonl(folder / "b.jsonl", texts[cut:])
    corpus = Corpus(CorpusConfig(path=str(folder), on_invalid_utf8="skip"))
    records = list(corpus.records())
    assert len(records) == len(texts)
    assert [r.text for r in records] == [t if t and not t.isspace() and INVALID not in t else "" for t in texts]
    for index, record in enumerate(records):
        assert list(corpus.records(start=record.next)) == records[index + 1 :]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("format", ["parquet", "stream.arrow", "file.arrow"])
def test_every_type_of_column_is_read_from_any_record(tmp_path: Path, format: str, kind: pa.DataType) -> None:
    texts = [f"{text} {n % 7}" for n in range(500) for text in TEXTS]
    table = pa.table({"meta": pa.nulls(len(texts)), "text": pa.array([*texts[:-1], None], pa.string()).cast(kind)})
    path = tmp_path / f"a.{format}"
    if format == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    else:
        new = pa.ipc.new_stream if format == "stream.arrow" else pa.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=1700)
    corpus = Corpus(CorpusConfig(path=str(path)))
    records = list(corpus.records())
    assert [record.text for record in records] == [*texts[:-1], ""]
    for at in (0, 699, 1700, 2999):
        assert list(corpus.records(start=records[at].next)) == records[at + 1 :]


def test_an_error_of_the_hub_gives_no_advice_about_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = r"^some/set, after record 0: cannot be read as a dataset \(ConnectionError: no network\)$"
    with pytest.raises(DataError, match=message):
        list(Corpus(CorpusConfig(hub="some/set")).records())


def test_the_fingerprint_tells_corpora_apart(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    before = Corpus(CorpusConfig(path=str(path))).fingerprint()
    assert Corpus(CorpusConfig(path=str(path))).fingerprint() == before
    assert Corpus(CorpusConfig(path=str(path), on_invalid_utf8="skip")).fingerprint() != before
    write_jsonl(path, [*TEXTS[:-1], "LAST"])  # same path and size
    assert Corpus(CorpusConfig(path=str(path))).fingerprint() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "corpus.path="),
        ({"path": "a", "hub": "b"}, "not both"),
        ({"path": "does/not/exist.jsonl"}, r"corpus\.path=does/not/exist\.jsonl: no such file"),
        ({"path": "nothing/*.jsonl"}, r"corpus\.path=nothing/\*\.jsonl: no such file, folder or glob match"),
        ({"path": __file__}, r"test_corpora\.py: its suffix is not that of a format; set corpus\.format"),
        ({"path": __file__, "format": "pdf"}, r"corpus\.format=pdf: must be one of text, jsonl"),
        (
            {"path": __file__, "format": "text", "sample_by": "word"},
            r"corpus\.sample_by=word: must be one of line",
        ),
        (
            {"path": __file__, "on_invalid_utf8": "x"},
            r"corpus\.on_invalid_utf8=x: must be one of error, replace",
        ),
        ({"path": __file__, "quoting": "all"}, r"corpus\.quoting=all: must be one of minimal, none"),
        ({"path": __file__, "separator": "::"}, r"corpus\.separator='::': must be one character"),
    ],
)
def test_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Corpus(CorpusConfig(**options))


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(DataError, match="no file in this folder has a suffix of text, jsonl"):
        Corpus(CorpusConfig(path=str(tmp_path)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_text_field_lists_those_that_exist(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix)
    exist = "text" if suffix == ".txt" else "id, text"
    message = rf"corpus{suffix}, record 1: no field 'body' \(corpus.text_field\); existing fields: {exist}$"
    with pytest.raises(DataError, match=message):
        kept(str(path), text_field="body")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "a.jsonl, record 2: not valid JSON"),
        ('["a"]', "a.jsonl, record 2: a JSON list, not an object"),
        ('{"text": 7}', "a.jsonl, record 2: field 'text' is a int, not text"),
        ('{"txt": "a"}', "a.jsonl, record 2: no field 'text' .* existing fields: txt"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        kept(str(tmp_path))


@pytest.mark.parametrize("suffix", [".json", ".parquet", ".arrow", ".jsonl.gz", ".txt.xz"])
def test_a_file_of_another_format_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(b'{"text": "neither this format nor this compression')
    with pytest.raises(DataError, match=rf"bad{suffix}, after record 0: cannot be read as"):
        kept(str(path))


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(9999)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz, after record [1-9]\d*: cannot be read"):
        kept(str(tmp_path))


def write_invalid(folder: Path, suffix: str) -> None:
    """Three records, the second of which is not UTF-8."""
    if suffix == ".escaped.jsonl":
        lines = ["first", "sec\\udc00\\uD800ond", "third"]  # both halves of a pair, but the wrong way round
        (folder / f"bad{suffix}").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
        return
    texts = [b"first", b"sec\xff\xfeond", b"third"]
    path = folder / f"bad{suffix}"
    if suffix == ".parquet":
        array = pa.array(texts, pa.binary())
        column = pa.Array.from_buffers(pa.string(), len(array), array.buffers())
        pyarrow.parquet.write_table(pa.table({"text": column}), path)
    elif suffix == ".arrow":
        array = pa.array(texts, pa.binary())
        table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(array), array.buffers())})
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif suffix in (".csv", ".tsv"):
        path.write_bytes(b"text\n" + b"\n".join(texts))
    elif suffix == ".txt":
        path.write_bytes(b"\n\n".join(texts))
    else:
        path.write_bytes(b"".join(b'{"text": "%s"}\n' % text for text in texts))


@pytest.mark.parametrize("suffix", [".jsonl", ".escaped.jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow"])
def test_invalid_utf8_stops_is_replaced_or_skipped(tmp_path: Path, suffix: str) -> None:
    write_invalid(tmp_path, suffix)
    with pytest.raises(DataError, match=rf"bad{suffix}, record 2: not valid UTF-8.*corpus.on_invalid_utf8"):
        kept(str(tmp_path))
    assert kept(str(tmp_path), on_invalid_utf8="replace") == ["first", "sec\ufffd\ufffdond", "third"]
    assert kept(str(tmp_path), on_invalid_utf8="skip") == ["first", "third"]
