"""Renders a report as one HTML page with embedded images.

text = page(title, finding, points, problems, losses, validation, layers, tables)
"""

import base64
import datetime
import html
import re
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import charts
from launch.points import Point, Run
from launch.results import labels
from mone_common.run_folder import DamagedFile, read_file
from mone_common.text import printable

PICTURES_OF_A_RUN = ("expert_load", "neuron_use")
PNG = b"\x89PNG"
LONG = 24
"""Names up to this many characters are not wrapped."""
NAMES = ("point", "baseline", "run")
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


def page(
    title: str,
    finding: str,
    points: Sequence[Point],
    problems: Sequence[str],
    losses: Sequence[Chart],
    validation: Sequence[Chart],
    layers: Sequence[Chart],
    tables: Sequence[Table],
) -> str:
    """The HTML page, with its images embedded. problems: damaged files in the run folders."""
    runs = [run for point in points for run in point.runs]
    parts = []
    if incomplete := [run for run in runs if run.state != "complete"]:
        states = [printable(run.state) for run in incomplete]
        counts = html.escape(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
        parts.append(f'<p class="warning">{len(incomplete)} of {len(runs)} runs are not complete ({counts}): '
                     "their validation losses are not counted.</p>")  # fmt: skip
    if problems:
        listed = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
        parts.append(f'<div class="warning">Damaged:<ul>{listed}</ul></div>')
    if len(points) > charts.MOST:
        parts.append(f'<p class="note">The charts show {charts.MOST} of the {len(points)} points.</p>')
    for heading, those in (("Validation loss", validation), ("Training loss", losses), ("Experts and neurons", layers)):
        if those:
            parts += [f"<h2>{heading}</h2>", '<div class="charts">', *map(_figure, those), "</div>"]
    parts += [_details(point, label) for point, label in zip(points[: charts.MOST], labels(points), strict=False)]
    parts += [_html_table(table) for table in tables]
    command = shlex.join(["mone-report", *sys.argv[1:]])
    made = f"Made {datetime.datetime.now().isoformat(sep=' ', timespec='minutes')} by"
    made += f" <code>{html.escape(printable(command))}</code>"
    template = string.Template((Path(__file__).parent / "templates/report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title), finding=html.escape(finding), made=made, body="\n".join(filter(None, parts))
    )


def _figure(chart: Chart) -> str:
    return _image(chart.text, chart.path.read_bytes())


def _image(text: str, png: bytes) -> str:
    return f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></figure>'


def _details(point: Point, label: str) -> str:
    """The figures of experts and neurons of the first seed that has them."""
    for run in point.runs:
        drawn = [(name, png) for name in PICTURES_OF_A_RUN if (png := _picture(run, name)).startswith(PNG)]
        if drawn:
            pictures = "".join(_image(f"{name} of {label}", png) for name, png in drawn)
            summary = html.escape(f"{label}, seed {run.seed}: experts and neurons one by one")
            return f'<details><summary>{summary}</summary><div class="charts wide">{pictures}</div></details>'
    return ""


def _picture(run: Run, name: str) -> bytes:
    try:
        return read_file(run.folder / f"figures/{name}.png") or b""
    except DamagedFile:
        return b""  # a damaged figure is left out


def _html_table(table: Table) -> str:
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
