"""An HTML page without external files: figures are embedded, tables scroll on a narrow screen.

body = [*chart_section("Loss", [Chart(path, "loss over tokens")]), html_table(table)]
text = render("A study", "What it found, in one sentence.", body, "mone-report runs/a runs/b")
"""

import base64
import datetime
import html
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mone_common.text import printable

LONG = 24
"""Names up to this many characters are not wrapped."""
NAMES = ("point", "baseline", "run", "stream", "task", "criterion")
"""Headings of the columns that contain names."""


@dataclass(frozen=True)
class Table:
    """A table of text."""

    title: str
    note: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Chart:
    """A PNG file and its caption."""

    path: Path
    text: str


def render(title: str, finding: str, body: Sequence[str], command: str) -> str:
    """The page. finding: its first sentence. body: parts in HTML. command: what made it."""
    made = f"Made {datetime.datetime.now().isoformat(sep=' ', timespec='minutes')} by"
    made += f" <code>{html.escape(printable(command))}</code>"
    template = string.Template((Path(__file__).parent / "templates/report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title), finding=html.escape(finding), made=made, body="\n".join(filter(None, body))
    )


def chart_section(heading: str, charts: Sequence[Chart]) -> list[str]:
    """A heading and its charts, in HTML; [] without charts."""
    if not charts:
        return []
    figures = [image(chart.text, chart.path.read_bytes()) for chart in charts]
    return [f"<h2>{html.escape(heading)}</h2>", '<div class="charts">', *figures, "</div>"]


def image(text: str, png: bytes) -> str:
    """An embedded figure; text: read in its place."""
    return f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'


def html_table(table: Table) -> str:
    """A table in HTML, with its title and note."""
    kinds = ["name" if heading in NAMES else "" for heading in table.headings]
    head = _cells("th", table.headings, kinds)
    rows = "".join(f"<tr>{_cells('td', row, kinds)}</tr>\n" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f"<h2>{html.escape(table.title)}</h2>{note}"
        '<p class="sideways" hidden>Scroll sideways for more columns. &rarr;</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _cells(tag: str, texts: Sequence[str], kinds: Sequence[str]) -> str:
    """Table cells; only long names are wrapped, after a comma or a slash."""
    cells = ""
    for text, kind in zip(texts, kinds, strict=True):
        breaks = kind and len(text) > LONG
        shown = re.sub(r"(?<=[,/])(?=\S)", "<wbr>", html.escape(text)) if breaks else html.escape(text)
        classes = f"{kind} long" if breaks else kind
        cells += f'<{tag} class="{classes}">{shown}</{tag}>' if classes else f"<{tag}>{shown}</{tag}>"
    return cells
