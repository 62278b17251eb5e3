"""Reads one column of a csv or tsv table with Python's csv module, which unlike pandas reports malformed rows.

with open_text(Path("table.csv"), newline="") as lines:
    for text in read_table(lines, field="text", separator=","): ...
"""

import csv
import logging
import re
from collections.abc import Iterable, Iterator

from data_prep.errors import DataError

logger = logging.getLogger(__name__)

QUOTINGS = ("minimal", "none")
OTHER_SEPARATORS = ",;\t|"
LARGEST_CELL = 1 << 28
"""Characters; longer than any document, but it bounds the memory that an unclosed quote uses."""
MOST_ROWS_OF_ONE_CELL = 20
"""Lines of a quoted cell in a table of one column without a warning; every line looks like a row there."""


def read_table(lines: Iterable[str], field: str, separator: str, quoting: str | None = None) -> Iterator[str]:
    """The cells of the column `field`; empty lines are skipped.

    quoting: "minimal": a cell that begins with a quote ends with one, may contain separators and line breaks, and doubles
    its own quotes. "none": a quote is an ordinary character. None: as minimal, but a cell whose lines look like rows of the
    table is an error, because its first quote is probably an ordinary character.

    Raises DataError for a table without the column, a row with more or fewer cells than the header, and malformed quotes.
    """
    table = _Table(lines, separator, quoting)
    header = next(table, None)
    column = -1
    for row in table:
        assert header is not None
        if column < 0:
            column = _column(header, field, separator)
        if len(row) != len(header):
            raise DataError(
                f"{_count(len(row))}, the header has {len(header)} ({table.line_numbers()}: {_start_of(table.lines[0])}). "
                f"The cells are separated by {separator!r} (corpus.separator), "
                + ("a quote is an ordinary character" if quoting == "none" else "cells may be quoted")
                + " (corpus.quoting)"
            )
        if quoting is None and len(table.lines) > 1:
            table.check_quotes(column, len(header))
        yield row[column]


def check_field(field: str, existing: Iterable[str]) -> None:
    """Raise DataError unless exactly one of the existing fields has the name `field`."""
    names = list(existing)
    if names.count(field) > 1:
        raise DataError(f"{names.count(field)} fields are called {field!r} (corpus.text_field)")
    if field not in names:
        first = ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in names[:20])
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise DataError(f"no field {field!r} (corpus.text_field); existing fields: {first or 'none'}{more}")


class _Table(Iterator[list[str]]):
    """Iterates over the rows that are not empty; `lines` has the lines of the last row."""

    def __init__(self, lines: Iterable[str], separator: str, quoting: str | None) -> None:
        csv.field_size_limit(LARGEST_CELL)
        self.lines: list[str] = []
        self._separator = separator
        self._reader = csv.reader(
            self._record(lines),
            delimiter=separator,
            quoting=csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL,
            strict=True,
        )
        self._warned = False

    def _record(self, lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            self.lines.append(line)
            yield line

    def __next__(self) -> list[str]:
        row: list[str] = []
        while not row or (len(row) == 1 and not row[0].strip()):
            self.lines.clear()
            try:
                row = next(self._reader)
            except csv.Error as error:
                raise DataError(
                    f"{_explanation(str(error))} ({self.line_numbers()}: {_start_of(self.lines[0])}). "
                    "If quotes are ordinary characters in this file, set corpus.quoting=none"
                ) from error
        return row

    def line_numbers(self) -> str:
        """The line numbers of the last row, from 1."""
        last = self._reader.line_num
        first = last - len(self.lines) + 1
        return f"line {last}" if first == last else f"lines {first} to {last}"

    def check_quotes(self, column: int, width: int) -> None:
        """Raise DataError if each line of the last row would be a row of its own without quoting.

        If that may be chance, warn instead, once per table. It is not chance if the cells of all other columns are numbers
        or names with numbers, with the same pattern in all lines.
        """
        rows = [line.rstrip("\r\n").split(self._separator) for line in self.lines if not line.isspace()]
        if len(rows) < 2 or any(len(row) != width for row in rows):
            return
        message = (
            f"a quoted cell ends {len(self.lines) - 1} lines after its start, and all its lines look like rows of "
            f"the table ({self.line_numbers()}: {_start_of(self.lines[0])}). Set corpus.quoting=none if quotes are ordinary "
            "characters in this file, corpus.quoting=minimal if this is one cell"
        )
        others = {tuple(_shape(cell) for n, cell in enumerate(row) if n != column) for row in rows}
        if width > 1 and len(others) == 1 and all("0" in cell for cell in others.pop()):
            raise DataError(message)
        if not self._warned and (width > 1 or len(rows) > MOST_ROWS_OF_ONE_CELL):
            self._warned = True
            logger.warning(message)


def _column(header: list[str], field: str, separator: str) -> int:
    try:
        check_field(field, header)
    except DataError as error:
        others = [other for other in OTHER_SEPARATORS if other != separator and other in header[0]]
        if len(header) > 1 or not others:
            raise
        raise DataError(
            f"{error}. Cells are separated by {separator!r}; if this file uses {others[0]!r}, "
            + ("set corpus.format=tsv" if others[0] == "\t" else f"set 'corpus.separator=\"{others[0]}\"'")
        ) from error
    return header.index(field)


def _explanation(message: str) -> str:
    if message == "unexpected end of data":
        return "a quoted cell has no closing quote"
    if "expected after" in message:
        return "text after the closing quote of a cell; a quote in a quoted cell must be doubled"
    if "field larger than" in message:
        return f"a cell has more than {LARGEST_CELL:,} characters; its closing quote may be missing"
    return message


def _shape(cell: str) -> str:
    """The pattern of a cell: every number becomes 0, every word becomes a."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", cell))


def _count(cells: int) -> str:
    return "1 cell" if cells == 1 else f"{cells} cells"


def _start_of(line: str) -> str:
    line = line.rstrip("\r\n")
    return repr(line if len(line) <= 60 else f"{line[:60]}...")
