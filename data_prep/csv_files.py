"""One column of a table of separated values, by Python's csv module, which checks what pandas guesses.

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
"""Characters: no document is as long, and a quote that nobody closes is not to fill the memory."""
MOST_ROWS_OF_ONE_CELL = 20
"""Lines of a cell in a table of one column that give no warning: each line without a separator looks like a row there."""


def read_table(lines: Iterable[str], field: str, separator: str, quoting: str | None = None) -> Iterator[str]:
    """The cells of the column `field`, without lines that are empty.

    quoting: "minimal": a cell that begins with a quote ends with one, may hold separators and line breaks, and doubles
    its own quotes. "none": a quote is a character like others. None: as minimal, but a cell whose lines look like
    rows of the table is refused, since it comes of a quote that begins no quoted cell.

    Raises DataError for a table without the column, a row with more or fewer cells than the header, and quotes that do
    not fit.
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
                f"{_count(len(row))}, the header has {len(header)} ({table.place()}: {_start_of(table.lines[0])}). "
                f"The cells are separated by {separator!r} (corpus.separator), "
                + ("a quote is a character like others" if quoting == "none" else "cells may be quoted")
                + " (corpus.quoting)"
            )
        if quoting is None and len(table.lines) > 1:
            table.check_quotes(column, len(header))
        yield row[column]


def check_field(field: str, existing: Iterable[str]) -> None:
    """Raise DataError unless `field` is exactly one of the existing ones."""
    names = list(existing)
    if names.count(field) > 1:
        raise DataError(f"{names.count(field)} fields are called {field!r} (corpus.text_field)")
    if field not in names:
        shown = ", ".join(name if len(name) <= 40 else f"{name[:40]}..." for name in names[:20])
        more = f" and {len(names) - 20} more" if len(names) > 20 else ""
        raise DataError(f"no field {field!r} (corpus.text_field); fields that exist: {shown or 'none'}{more}")


class _Table(Iterator[list[str]]):
    """Rows that are not empty, and the lines that the last one was made of."""

    def __init__(self, lines: Iterable[str], separator: str, quoting: str | None) -> None:
        csv.field_size_limit(LARGEST_CELL)
        self.lines: list[str] = []
        self._separator = separator
        self._reader = csv.reader(
            self._noted(lines),
            delimiter=separator,
            quoting=csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL,
            strict=True,
        )
        self._told = False

    def _noted(self, lines: Iterable[str]) -> Iterator[str]:
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
                    f"{_explanation(str(error))} ({self.place()}: {_start_of(self.lines[0])}). "
                    "If quotes are characters like others in this file, set corpus.quoting=none"
                ) from error
        return row

    def place(self) -> str:
        """The lines of the last row by their numbers, from 1."""
        last = self._reader.line_num
        first = last - len(self.lines) + 1
        return f"line {last}" if first == last else f"lines {first} to {last}"

    def check_quotes(self, column: int, width: int) -> None:
        """Refuse a last row whose every line is a row if quotes are characters; warn where that may be chance, once a table.

        It is none if the cells of all other columns are numbers, or names with numbers, of one form.
        """
        rows = [line.rstrip("\r\n").split(self._separator) for line in self.lines if not line.isspace()]
        if len(rows) < 2 or any(len(row) != width for row in rows):
            return
        message = (
            f"a quote opens a cell that ends {len(self.lines) - 1} lines later, and all lines in it look like rows of "
            f"the table ({self.place()}: {_start_of(self.lines[0])}). Set corpus.quoting=none if quotes are characters "
            "like others in this file, corpus.quoting=minimal if this is one cell"
        )
        others = {tuple(_shape(cell) for n, cell in enumerate(row) if n != column) for row in rows}
        if width > 1 and len(others) == 1 and all("0" in cell for cell in others.pop()):
            raise DataError(message)
        if not self._told and (width > 1 or len(rows) > MOST_ROWS_OF_ONE_CELL):
            self._told = True
            logger.warning(message)


def _column(header: list[str], field: str, separator: str) -> int:
    try:
        check_field(field, header)
    except DataError as error:
        others = [other for other in OTHER_SEPARATORS if other != separator and other in header[0]]
        if len(header) > 1 or not others:
            raise
        raise DataError(
            f"{error}. Cells are separated by {separator!r}: if this file has {others[0]!r}, "
            + ("set corpus.format=tsv" if others[0] == "\t" else f"set 'corpus.separator=\"{others[0]}\"'")
        ) from error
    return header.index(field)


def _explanation(message: str) -> str:
    if message == "unexpected end of data":
        return "a quote opens a cell and nothing closes it"
    if "expected after" in message:
        return "something follows the quote that closes a cell; a quote in a quoted cell must be doubled"
    if "field larger than" in message:
        return f"a cell of more than {LARGEST_CELL:,} characters; perhaps nothing closes a quote"
    return message


def _shape(cell: str) -> str:
    """A cell with every number as 0 and every word as a."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", cell))


def _count(cells: int) -> str:
    return "1 cell" if cells == 1 else f"{cells} cells"


def _start_of(line: str) -> str:
    line = line.rstrip("\r\n")
    return repr(line if len(line) <= 60 else f"{line[:60]}...")
