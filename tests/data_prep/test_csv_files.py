"""Rows with wrong numbers of cells and malformed quotes are errors; the text always comes from the right column."""

from pathlib import Path
from typing import Any

import pytest

from data_prep.corpora import Corpus, CorpusConfig
from data_prep.errors import DataError


def read(path: Path, content: str, **options: Any) -> list[str]:
    path.write_bytes(content.encode())
    return [record.text for record in Corpus(CorpusConfig(path=str(path), **options)).records()]


ROWS = [f"{n},Sentence {n} of the corpus." for n in range(50)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["text,source", "a,b,", "c,d,"], r"record 1: 3 cells, the header has 2 \(line 2: 'a,b,'\)"),
        (["text,source", "a,b", "c,d,e"], r"record 2: 3 cells, the header has 2 \(line 3: 'c,d,e'\)"),
        (["source,text", "a,b", "", "c"], r"record 2: 1 cell, the header has 2 \(line 4: 'c'\)"),
        (["source,text,", "a,b"], "record 1: 2 cells, the header has 3"),
        (["text,source", '"a', 'b",c,d'], r"record 1: 3 cells, the header has 2 \(lines 2 to 3: '\"a'\)"),
        (["text,text", "a,b"], "record 1: 2 fields are called 'text'"),
        (["source,body", "a,b"], "record 1: no field 'text' .* existing fields: source, body"),
        (["a" * 99 + ",b", "c,d"], r"record 1: no field 'text' .* existing fields: a{40}\.\.\., b$"),
    ],
)
@pytest.mark.parametrize("separator", [",", "\t"])
def test_rows_that_do_not_fit_the_header_are_refused(tmp_path: Path, separator: str, rows: list[str], message: str) -> None:
    content = "\n".join(rows).replace(",", separator)
    name = "a.csv" if separator == "," else "a.tsv"
    message = message.replace("'a,b,'", r"'a\\tb\\t'").replace("c,d,e", r"c\\td\\te") if separator == "\t" else message
    with pytest.raises(DataError, match=rf"a\.[ct]sv, {message}"):
        read(tmp_path / name, content, quoting="minimal")


def test_quotes_are_characters_in_tsv(tmp_path: Path) -> None:
    texts = [row.split(",")[1] for row in ROWS]
    texts[7] = '"opens a quotation'
    texts[8] = 'and here it ends" said the speaker'
    texts[20] = '"'
    texts[30] = 'an inch mark 12"'
    texts[31] = '"whole"'
    content = "id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts))
    assert read(tmp_path / "a.tsv", content) == texts
    assert read(tmp_path / "a.csv", content, separator="\t", quoting="none") == texts
    with pytest.raises(DataError, match="corpus.quoting=none"):
        read(tmp_path / "a.tsv", content, quoting="minimal")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({10: '10,"never closed'}, r"record 11: a quoted cell has no closing quote \(lines 12 to 51: '10,\"never"),
        ({10: '10,"one', 12: '12,other" mark'}, "record 11: text after the closing quote of a cell"),
        ({10: '10,"', 40: '40,an inch mark 12"'}, "record 11: a quoted cell ends 30 lines after its start"),
        ({10: '10,"', 11: '11,an inch mark 12"'}, "record 11: a quoted cell ends 1 lines after its start"),
    ],
)
def test_a_quote_that_spans_rows_is_an_error(tmp_path: Path, changes: dict[int, str], message: str) -> None:
    rows = [changes.get(n, row) for n, row in enumerate(ROWS)]
    with pytest.raises(DataError, match=rf"a\.csv, {message}.*corpus\.quoting=none"):
        read(tmp_path / "a.csv", "\n".join(["id,text", *rows]))
    texts = [row.split(",", 1)[1] for row in rows]
    assert read(tmp_path / "a.csv", "\n".join(["id,text", *rows]), quoting="none") == texts


def test_cells_of_several_lines_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cells = ['Dear Sir,\nthe "machine", as you say,\n\nworks.', "Capitals:\r\nParis, France\r\nRome", "x\ry", "\n\n", "NA\0"]
    quoted = [cell.replace('"', '""') for cell in cells]
    content = "id,text\n" + "".join(f'{n},"{cell}"\n' for n, cell in enumerate(quoted))
    assert read(tmp_path / "a.csv", content) == [cell if cell.strip() else "" for cell in cells]
    assert caplog.messages == []
    list_of_cities = "Capitals\nParis, France\nRome, Italy\nBern, Switzerland\nLima, Peru"
    assert read(tmp_path / "a.csv", f'title,text\nEurope,"{list_of_cities}"\n') == [list_of_cities]
    assert "a quoted cell ends 4 lines after its start" in caplog.text
    numbers = "Winners\n1, Ann\n2, Bob"
    with pytest.raises(DataError, match=r"corpus\.quoting=minimal if this is one cell"):
        read(tmp_path / "a.csv", f'id,text\n7,"{numbers}"\n')
    assert read(tmp_path / "a.csv", f'id,text\n7,"{numbers}"\n', quoting="minimal") == [numbers]


@pytest.mark.parametrize(("taken_in", "warns"), [(0, False), (1, True), (2, True), (3, True), (10, True)])
def test_a_quote_that_spans_few_rows_gives_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, taken_in: int, warns: bool
) -> None:
    rows = [f"{'x y' if n % 2 else 'z'},words" for n in range(40)]
    for start in (5, 20):
        rows[start] = 'z,"opens' + ('"' if not taken_in else "")
        if taken_in:
            rows[start + taken_in] = 'x y,closes"'
    assert len(read(tmp_path / "a.csv", "\n".join(["source,text", *rows]))) == 40 - 2 * taken_in
    assert caplog.text.count("a quoted cell ends") == warns
    caplog.clear()
    assert len(read(tmp_path / "a.csv", "\n".join(["source,text", *rows]), quoting="minimal")) == 40 - 2 * taken_in
    assert caplog.messages == []


@pytest.mark.parametrize(("lines", "separators", "warns"), [(30, 0, True), (10, 0, False), (30, 1, False)])
def test_a_quote_in_a_table_of_one_column(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: int, separators: int, warns: bool
) -> None:
    cell = "\n".join(f"line {n}" for n in range(lines)) + "," * separators
    assert read(tmp_path / "a.csv", f'text\nfirst\n"{cell}"\n"{cell}"\nlast') == ["first", cell, cell, "last"]
    assert caplog.text.count(f"a quoted cell ends {lines - 1} lines after its start") == warns


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end(tmp_path: Path, end: str) -> None:
    assert read(tmp_path / "a.csv", end.join(["id,text", "1,a", "", " ", '2,"b"', ""])) == ["a", "b"]
    assert read(tmp_path / "a.tsv", end.join(["id\ttext", "1\ta", "", "2\tb", ""])) == ["a", "b"]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "text\n" + "x" * 1_000_000) == ["x" * 1_000_000]


@pytest.mark.parametrize(
    ("separator", "way_out"),
    [(";", r"'corpus\.separator=\";\"'"), ("|", r"'corpus\.separator="), ("\t", r"corpus\.format=tsv")],
)
def test_another_separator_is_named(tmp_path: Path, separator: str, way_out: str) -> None:
    content = f"id{separator}text\n1{separator}a, b\n"
    with pytest.raises(DataError, match=rf"no field 'text'.*if this file uses .*, set {way_out}"):
        read(tmp_path / "a.csv", content)
    assert read(tmp_path / "a.csv", content, separator=separator) == ["a, b"]
