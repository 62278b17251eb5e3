"""Tables and figures of the recorded experiments, in docs/evidence.md and docs/images.

    update_page(plan, Path("docs/evidence/runs"), Path("docs/evidence.md"))

Text between `<!-- NAME -->` and `<!-- end NAME -->` is replaced by the tables of experiment NAME; everything else is written
by hand.
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.charts import draw_validation_by_point
from launch.contrasts import Assessment, assessment
from launch.experiments import Experiment, Plan, full_name
from launch.points import Point, Run
from launch.recorded import find_records, read_record
from launch.statistics import Contrast, contrast, holm
from launch.tables import tabulate_contrasts
from mone_common.console import UserError
from mone_common.files import writing
from mone_common.page import Table
from mone_common.text import clock

TRAINED = "trained"
"""Name of the evaluation that selects neurons as in training."""
RATIO_NAMES = {"1": "1", "1_2": "1/2", "1_4": "1/4", "1_8": "1/8"}
"""Ends of the names of evaluations that keep another share of the neurons than training did, and the shares."""
SELECTIONS = {"ratio": "the K best", "threshold": "by threshold"}
"""Beginnings of these names, and how they select."""


def read_points(plan: Plan, records: Path) -> dict[str, Point]:
    """The points that have reported runs, by EXPERIMENT/POINT. DamagedFile for a damaged record."""
    found: dict[str, list[Run]] = {}
    for path in find_records(records):
        point, _, seed = path.stem.partition(",")
        if seed.startswith("seed="):  # not a run that chose a learning rate
            run = dataclasses.replace(read_record(path), evaluation=TRAINED)
            found.setdefault(f"{path.parent.name}/{point}", []).append(run)
    return {
        full_name(name, point): Point(name, point, name, tuple(sorted(runs, key=lambda run: run.seeds)))
        for name, experiment in plan.experiments.items()
        for point in experiment.points
        if (runs := found.get(full_name(name, point)))
    }


def assess_plan(plan: Plan, points: Mapping[str, Point]) -> dict[str, list[Assessment]]:
    """The contrasts of each experiment with at least two pairs of runs; Holm's correction is for the primary ones."""
    found: dict[str, list[tuple[str, str, Contrast]]] = {}
    for name, experiment in plan.experiments.items():
        for pair in experiment.contrasts:
            point, base = (full_name(name, each) for each in pair)
            if point in points and base in points:
                differences = points[point].difference(points[base]).values
                if len(differences) > 1:
                    found.setdefault(name, []).append((point, base, contrast(differences, margin=plan.margin)))
    primary = {(point, base): test.p for its in found.values() for point, base, test in its if [point, base] in plan.primary}
    corrected = dict(zip(primary, holm(list(primary.values())), strict=True))
    return {
        name: [
            assessment(
                point.removeprefix(f"{name}/"),
                base.removeprefix(f"{name}/"),
                points[point],
                points[base],
                test,
                p_holm=corrected.get((point, base), math.nan),
            )
            for point, base, test in its
        ]
        for name, its in found.items()
    }


def describe(plan: Plan, name: str, points: Mapping[str, Point], tables: list[Table]) -> str:
    """The tables of an experiment in Markdown; tables: those of its contrasts."""
    experiment = plan.experiments[name]
    own = {point: points[full_name(name, point)] for point in experiment.points if full_name(name, point) in points}
    if not own:
        return "No reported run yet."
    parts = [tabulate(own), *(markdown(table.headings, table.rows) for table in tables)]
    if table := ratios_table(own):
        parts.append(table)
    missing = [point for point in experiment.points if point not in own or len(own[point].complete) < len(experiment.seeds)]
    if missing:
        parts.append(f"Not complete: {', '.join(missing)}.")
    return "\n\n".join(parts)


def markdown(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tabulate(points: Mapping[str, Point]) -> str:
    """Sizes, costs and losses of points."""
    rows = []
    for name, point in points.items():
        parameters, flops = point.parameters, point.training_flops
        seconds = [run.seconds for run in point.complete if run.seconds]
        memory = [run.peak_gib for run in point.complete if run.peak_gib]
        rates = {f"{run.options['optimizer.lr']:g}" for run in point.complete}
        rows.append(
            (
                name,
                f"{parameters.total / 1e6:.2f}M",
                f"{parameters.active / 1e6:.2f}M",
                f"{parameters.active_moe_params:.1%}",
                f"{flops.sparse / 1e6:.1f}M",
                f"{flops.dense / 1e6:.1f}M",
                clock(statistics.fmean(seconds)),
                f"{max(memory):.2f}",
                ", ".join(sorted(rates)),
                str(len(point.complete)),
                str(point.validation),
            )
        )
    return markdown(
        (
            *("point", "parameters", "active", "`active_moe_params`", "FLOPs owed", "FLOPs of dense kernels"),
            *("time", "peak GiB", "learning rate", "seeds", "loss"),
        ),
        rows,
    )


def ratios_table(points: Mapping[str, Point]) -> str:
    """Mean loss of each point when it keeps another share of its neurons; empty if that was not evaluated."""
    rows = []
    for name, point in points.items():
        for kind, how in SELECTIONS.items():
            losses = {
                end: [
                    run.evaluations[f"{kind}_{end}"].nats_per_token
                    for run in point.complete
                    if f"{kind}_{end}" in run.evaluations
                ]
                for end in RATIO_NAMES
            }
            seeds = max(map(len, losses.values()))
            cells = (f"{statistics.fmean(values):.4f}" if values else "-" for values in losses.values())
            if seeds:
                rows.append((f"{name}, trained at {point.ratio:g}", how, str(seeds), *cells))
    return markdown(("loss at ratio", "neurons kept", "seeds", *RATIO_NAMES.values()), rows) if rows else ""


def update_page(plan: Plan, records: Path, page: Path) -> None:
    """Write the tables of all experiments to the page, and their figures beside it; UserError for a missing place."""
    points = read_points(plan, records)
    assessed = assess_plan(plan, points)
    text = page.read_text(encoding="utf-8")
    for name, experiment in plan.experiments.items():
        block = re.compile(rf"(?s)(<!-- {name} -->\n).*?(<!-- end {name} -->)")
        if not block.search(text):
            raise UserError(f"{page}: has no place for the tables of {name}: <!-- {name} --> and <!-- end {name} -->")
        tables = describe(plan, name, points, tabulate_contrasts(assessed.get(name, [])))
        if draw(name, experiment, points, page.parent / "images"):
            tables += f"\n\n![Loss of each point of {name}](images/evidence_{name}.png)"
        text = block.sub(lambda found, tables=tables: f"{found[1]}\n{tables}\n\n{found[2]}", text)  # type: ignore[misc]
    with writing(page) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def draw(name: str, experiment: Experiment, points: Mapping[str, Point], folder: Path) -> bool:
    """Draw the losses of an experiment's points and of the baselines from other experiments."""
    pairs = [full_name(name, each) for pair in experiment.contrasts for each in pair]
    shown = [points[each] for each in dict.fromkeys(pairs) if each in points]
    if not any(full_name(name, point) in points for point in experiment.points):
        return False
    return draw_validation_by_point(folder / f"evidence_{name}.png", shown)
