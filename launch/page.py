"""Renders a report as one HTML page with embedded images.

text = page(title, finding, points, problems, losses, validation, layers, tables)
"""

import html
import shlex
import sys
from collections.abc import Sequence

from launch import charts
from launch.points import Point, Run
from launch.results import labels
from mone_common.page import Chart, Table, chart_section, html_table, image, render
from mone_common.run_folder import DamagedFile, read_file
from mone_common.text import printable

PICTURES_OF_A_RUN = ("expert_load", "neuron_use")
PNG = b"\x89PNG"


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
        parts += chart_section(heading, those)
    parts += [_details(point, label) for point, label in zip(points[: charts.MOST], labels(points), strict=False)]
    parts += [html_table(table) for table in tables]
    return render(title, finding, parts, shlex.join(["mone-report", *sys.argv[1:]]))


def _details(point: Point, label: str) -> str:
    """The figures of experts and neurons of the first seed that has them."""
    for run in point.runs:
        drawn = [(name, png) for name in PICTURES_OF_A_RUN if (png := _picture(run, name)).startswith(PNG)]
        if drawn:
            pictures = "".join(image(f"{name} of {label}", png) for name, png in drawn)
            summary = html.escape(f"{label}, seed {run.seed}: experts and neurons one by one")
            return f'<details><summary>{summary}</summary><div class="charts wide">{pictures}</div></details>'
    return ""


def _picture(run: Run, name: str) -> bytes:
    try:
        return read_file(run.folder / f"figures/{name}.png") or b""
    except DamagedFile:
        return b""  # a damaged figure is left out
