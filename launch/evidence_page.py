"""Tables and figures of the recorded experiments, in docs/evidence.md and docs/images.

    update_page(plan, Path("docs/evidence/runs"), Path("docs/evidence.md"), readme=Path("README.md"))

Text between `<!-- NAME -->` and `<!-- end NAME -->` is replaced; everything else is written by hand. NAME is that of an
experiment, or `headline`, `claims` or `costs`.
"""

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launch.charts import draw_claims, draw_costs, draw_validation_by_point
from launch.claims import OUTCOMES, Claim, verdict
from launch.contrasts import Assessment, assessment
from launch.experiments import TRAINED, Experiment, Pair, Plan, Planned, best_rate, full_name
from launch.points import Point, Run
from launch.recorded import read_record
from launch.statistics import Contrast, contrast, holm
from launch.tables import tabulate_contrasts
from mone_common.console import UserError
from mone_common.files import writing
from mone_common.page import Table
from mone_common.run_folder import DamagedFile
from mone_common.text import clock

RATIO_NAMES = {"1": "1", "1_2": "1/2", "1_4": "1/4", "1_8": "1/8"}
"""Ends of the names of evaluations that keep another share of the neurons than training did, and the shares."""
SELECTIONS = {"ratio": "the K best", "threshold": "by threshold"}
"""Beginnings of these names, and how they select."""
NEURONS = {
    "dead": "neurons that no token kept",
    "usage_gini": "Gini coefficient of use",
    "gate_magnitude": "mean absolute activated gate",
    "threshold": "smallest score kept, mean",
}
"""Metrics of neurons (docs/metrics.md) and their headings."""
NO_RUN = "No reported run yet."
Judged = tuple[Claim, Contrast | None, str]
"""A claim with the test of its difference, if there is one, and the verdict."""


def read_records(folder: Path) -> dict[str, Run]:
    """The recorded runs by `Planned.name`; UserError for a damaged record."""
    try:
        return {f"{path.parent.name}/{path.stem}": read_record(path) for path in sorted(folder.glob("*/*.json"))}
    except DamagedFile as error:
        raise UserError(str(error)) from error


def losses_of(plan: Plan, runs: Mapping[str, Run]) -> dict[str, float]:
    """Held-out loss of each run whose record has all planned evaluations, nats per token."""
    return {name: run.evaluations[TRAINED].nats_per_token for name, run in runs.items() if _is_whole(plan, name, run)}


def _is_whole(plan: Plan, name: str, run: Run) -> bool:
    """Whether the record of a run has all planned evaluations; name: of `Planned`."""
    return plan.evaluations_of(name) <= run.evaluations.keys()


def read_points(plan: Plan, records: Path) -> dict[str, Point]:
    """The points that have reported runs, by EXPERIMENT/POINT.

    UserError for a damaged record, or one whose options are not those of the plan.
    """
    recorded = read_records(records)
    losses, found = losses_of(plan, recorded), {}
    for name, experiment in plan.experiments.items():
        for point in experiment.points:
            rate = best_rate(plan, losses, name, point)
            runs = []
            for seed in sorted(experiment.seeds):
                planned = Planned(name, point, seed, rate or 0.0, tuning=False)
                if run := recorded.get(planned.name):
                    runs.append(dataclasses.replace(run, evaluation=TRAINED))
                    ignored = ("logging.", *(["optimizer.lr"] if rate is None else []))
                    overrides = [option for option in planned.overrides(plan) if not option.startswith(tuple(ignored))]
                    _check_options(run, overrides)
            if runs:
                found[full_name(name, point)] = Point(name, point, name, tuple(runs))
    return found


def _check_options(run: Run, overrides: list[str]) -> None:
    for override in overrides:
        name = override.partition("=")[0]
        planned, found = OmegaConf.select(OmegaConf.from_dotlist([override]), name), run.options.get(name)
        if found != planned:
            way_out = "move the record away and train again, or correct the plan"
            raise UserError(f"{run.folder}: {name}={found}, but the plan has {planned}; {way_out}")


def evaluated(points: Mapping[str, Point], name: str) -> Point | None:
    """The point EXPERIMENT/POINT or, for its runs with that evaluation, EXPERIMENT/POINT@EVALUATION; None without runs."""
    name, _, evaluation = name.partition("@")
    point = points.get(name)
    if point is None or not evaluation:
        return point
    runs = [dataclasses.replace(run, evaluation=evaluation) for run in point.runs if evaluation in run.evaluations]
    return dataclasses.replace(point, runs=tuple(runs)) if runs else None


def paired(point: Point, base: Point) -> tuple[Point, Point]:
    """Both points, with the complete runs that have a partner.

    Partners have the same seeds, were trained on the same kind of processor, and were scored on the same documents and
    tokens. If not all pairs were scored on the same documents, those on the most frequent ones are used.
    """

    def text(run: Run) -> Any:
        return run.documents and (run.documents.sha256, tuple(run.documents.tokens))

    def key(run: Run) -> Any:
        return run.seeds, run.processor, text(run)

    partners = set(map(key, point.complete)) & set(map(key, base.complete))
    most_frequent = Counter(scored for *_, scored in sorted(partners, key=str)).most_common(1)

    def only(one: Point) -> Point:
        runs = (run for run in one.complete if key(run) in partners and text(run) == most_frequent[0][0])
        return dataclasses.replace(one, runs=tuple(runs))

    return only(point), only(base)


def differences(points: Mapping[str, Point], names: Pair) -> dict[tuple[int, ...], float]:
    """Loss of the first point minus that of the second by seeds; names: as for `evaluated`."""
    point, base = (evaluated(points, name) for name in names)
    if point is None or base is None:
        return {}
    runs = (each.runs for each in paired(point, base))
    pairs = [(ours.seeds, ours.validation_loss, theirs.validation_loss) for ours, theirs in zip(*runs, strict=True)]
    return {seeds: ours - theirs for seeds, ours, theirs in pairs if ours is not None and theirs is not None}


def tested(plan: Plan, points: Mapping[str, Point], pairs: Iterable[Pair]) -> dict[Pair, Contrast]:
    """The differences between these points, where there are at least two pairs of runs."""
    found = {pair: list(differences(points, pair).values()) for pair in pairs}
    return {pair: contrast(values, margin=plan.margin) for pair, values in found.items() if len(values) > 1}


def correct(plan: Plan, tests: Mapping[Pair, Contrast]) -> dict[Pair, Contrast]:
    """The tests with Holm's p values for the primary contrasts; those that were not tested count as tests too."""
    primary = {pair: test for pair, test in tests.items() if list(pair) in plan.primary}
    missing = [1.0] * (len(plan.primary) - len(primary))

    def corrected(name: str) -> list[float]:
        return holm([*(getattr(test, name) for test in primary.values()), *missing])

    of_primary = zip(primary.items(), corrected("p"), corrected("p_equivalent"), corrected("p_above"), strict=False)
    return {**tests} | {
        pair: dataclasses.replace(test, p=p, p_equivalent=p_equivalent, p_above=p_above)
        for (pair, test), p, p_equivalent, p_above in of_primary
    }


def interactions(plan: Plan, name: str, points: Mapping[str, Point]) -> list[Assessment]:
    """By how much the contrasts of an experiment exceed those of the experiment that it names."""
    found, other = [], plan.experiments[name].interaction
    for point, base in plan.experiments[name].contrasts if other is not None else ():
        here, there = (differences(points, (f"{where}/{point}", f"{where}/{base}")) for where in (name, other))
        excess = [here[seeds] - there[seeds] for seeds in sorted(here.keys() & there.keys())]
        if len(excess) > 1:
            result = contrast(excess, margin=plan.margin)
            found.append(Assessment(f"{point} - {base}", f"{point} - {base} of {other}", result, math.nan, None, math.nan))
    return found


def assess_plan(plan: Plan, points: Mapping[str, Point]) -> dict[str, list[Assessment]]:
    """The contrasts of each experiment with at least two pairs of runs; Holm's correction is for the primary ones."""
    tests = tested(plan, points, (pair for name in plan.experiments for pair in plan.contrasts_of(name)))
    corrected = correct(plan, tests)
    return {
        name: [
            assessment(
                pair[0].removeprefix(f"{name}/"),
                pair[1].removeprefix(f"{name}/"),
                *paired(points[pair[0]], points[pair[1]]),
                dataclasses.replace(tests[pair], p_equivalent=corrected[pair].p_equivalent),
                p_holm=corrected[pair].p if list(pair) in plan.primary else math.nan,
            )
            for pair in plan.contrasts_of(name)
            if pair in tests
        ]
        + interactions(plan, name, points)
        for name in plan.experiments
    }


def verdicts(plan: Plan, points: Mapping[str, Point]) -> list[Judged]:
    """The verdict on each claim."""
    tests = tested(plan, points, (_pair(claim.contrast) for claim in plan.claims))
    corrected, found = correct(plan, tests), []
    for claim in plan.claims:
        pair = _pair(claim.contrast)
        planned = len(plan.seeds_of(pair))
        result = verdict(claim.says, corrected[pair], planned=planned) if pair in tests else "not yet measured"
        found.append((claim, tests.get(pair), result))
    return found


def outcomes(judged: Sequence[Judged]) -> list[tuple[Claim, Contrast, str]]:
    """The claims that have all planned seeds, each with its test and outcome."""
    found = ((claim, test, result.partition(":")[0]) for claim, test, result in judged)
    return [(claim, test, outcome) for claim, test, outcome in found if test is not None and outcome in OUTCOMES]


def describe_claims(judged: Sequence[Judged]) -> str:
    """The claims with their differences and verdicts."""
    rows = []
    for claim, test, result in judged:
        cells = ("", "", "")
        if test is not None:
            cells = (f"{test.mean:+.4f}", f"{test.low:+.4f} to {test.high:+.4f}", str(test.pairs))
        rows.append((claim.claim, " - ".join(f"`{name}`" for name in claim.contrast), *cells, result))
    return markdown(("claim", "runs compared", "difference", "95 % interval", "seeds", "verdict"), rows)


def headline(plan: Plan, points: Mapping[str, Point], judged: Sequence[Judged]) -> str:
    """The primary contrasts of the first experiment, whose baseline is the plain MoE, and the verdicts on primary claims."""
    first = [pair for pair in plan.contrasts_of(next(iter(plan.experiments))) if list(pair) in plan.primary]
    parts = [
        f"{test.mean:+.3f} nats per token with {points[pair[0]].ratio:g} of the neurons "
        f"({test.low:+.3f} to {test.high:+.3f}, {test.pairs} of {len(plan.seeds_of(pair))} seeds)"
        for pair, test in tested(plan, points, first).items()
    ]
    if not parts:
        return "Not yet measured."
    sentences = [f"Loss minus that of the plain MoE with the same weights: {', '.join(parts)}."]
    primary = [claim for claim in plan.claims if claim.contrast in plan.primary]
    results = [outcome for claim, _, outcome in outcomes(judged) if claim in primary]
    counts = {name: results.count(name) for name in OUTCOMES} | {"without all seeds": len(primary) - len(results)}
    if primary:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        sentences.append(f"Primary claims ({len(primary)}): {listed}.")
    return " ".join(sentences)


def _pair(names: Sequence[str]) -> Pair:
    return names[0], names[1]


def describe(plan: Plan, name: str, points: Mapping[str, Point], tables: list[Table]) -> str:
    """The tables of an experiment in Markdown; tables: those of its contrasts."""
    experiment = plan.experiments[name]
    own = {point: points[full_name(name, point)] for point in experiment.points if full_name(name, point) in points}
    if not own:
        return NO_RUN
    elsewhere = dict.fromkeys(each for pair in experiment.contrasts for each in pair if "/" in each and each in points)
    others = {name: _of_seeds(points[name], experiment.seeds) for name in elsewhere}
    shown = own | {name: point for name, point in others.items() if point.runs}
    parts = [tabulate(shown), *(markdown(table.headings, table.rows) for table in tables)]
    parts += [table for table in (ratios_table(own), neurons_table(shown)) if table]
    commits = sorted({run.commit for point in own.values() for run in point.runs})
    parts.append(f"Commits of the code: {', '.join(commits)}.")
    missing = [
        point
        for point in experiment.points
        if not set(experiment.seeds) <= _complete_seeds(plan, full_name(name, point), own.get(point))
    ]
    if missing:
        parts.append(f"Not complete: {', '.join(missing)}.")
    return "\n\n".join(parts)


def _of_seeds(point: Point, seeds: Sequence[int]) -> Point:
    """The point with the runs of these seeds, whose mean loss is comparable with that of points with the same seeds."""
    return dataclasses.replace(point, runs=tuple(run for run in point.runs if run.seeds[0] in seeds))


def _complete_seeds(plan: Plan, name: str, point: Point | None) -> set[int]:
    """Seeds of the point EXPERIMENT/POINT whose run has all planned evaluations."""
    return {
        run.seeds[0]
        for run in (() if point is None else point.complete)
        if _is_whole(plan, f"{name},seed={run.seeds[0]}", run)
    }


def markdown(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tabulate(points: Mapping[str, Point]) -> str:
    """Sizes, costs and losses of points."""
    rows = []
    for name, point in points.items():
        parameters, flops = point.parameters, point.training_flops
        seconds = [run.undisturbed_seconds for run in point.complete if run.undisturbed_seconds]
        memory = max((run.peak_gib for run in point.complete if run.peak_gib), default=None)
        rates = {f"{run.options['optimizer.lr']:g}" for run in point.complete}
        rows.append(
            (
                name,
                f"{parameters.total / 1e6:.2f}M",
                f"{parameters.active / 1e6:.2f}M",
                f"{parameters.active_moe_params:.1%}",
                f"{flops.sparse / 1e6:.1f}M",
                f"{flops.dense / 1e6:.1f}M",
                clock(statistics.fmean(seconds)) if seconds else "-",
                "-" if memory is None else f"{memory:.2f}",
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
            names = {f"{kind}_{end}" for end in RATIO_NAMES}
            evaluated = set[str]().union(*(names & run.evaluations.keys() for run in point.complete))
            runs = [run for run in point.complete if evaluated <= run.evaluations.keys()] if evaluated else []
            losses = (
                [run.evaluations[f"{kind}_{end}"].nats_per_token for run in runs if f"{kind}_{end}" in evaluated]
                for end in RATIO_NAMES
            )
            cells = [f"{statistics.fmean(values):.4f}" if values else "-" for values in losses]
            if runs:
                rows.append((f"{name}, trained at {point.ratio:g}", how, str(len(runs)), *cells))
    return markdown(("loss at ratio", "neurons kept", "seeds", *RATIO_NAMES.values()), rows) if rows else ""


def neurons_table(points: Mapping[str, Point]) -> str:
    """How the points that select use their neurons at the end of training; empty without such points."""
    rows = []
    for name, point in points.items():
        values = [point.mean(f"neuron/{metric}") for metric in NEURONS]
        if point.ratio < 1 and None not in values:
            rows.append((name, *(f"{value:.3g}" for value in values)))
    return markdown(("point", *NEURONS.values()), rows) if rows else ""


def update_page(plan: Plan, records: Path, page: Path, *, readme: Path | None = None) -> None:
    """Write the tables of all experiments to the page, and their figures beside it; UserError for a missing place.

    readme: a file that has the headline, too.
    """
    points, images = read_points(plan, records), page.parent / "images"
    assessed = assess_plan(plan, points)
    blocks = {}
    for name, experiment in plan.experiments.items():
        blocks[name] = describe(plan, name, points, tabulate_contrasts(assessed[name]))
        if draw(name, experiment, points, images):
            blocks[name] += f"\n\n![Loss of each point of {name}](images/evidence_{name}.png)"
    if plan.claims:
        judged = verdicts(plan, points)
        blocks |= {"headline": f"**{headline(plan, points, judged)}**", "claims": describe_claims(judged)}
        drawn = [(claim.claim, test, outcome) for claim, test, outcome in outcomes(judged)]
        if draw_claims(images / "evidence_claims.png", drawn, plan.margin):
            blocks["claims"] += "\n\n![Difference and verdict of each claim](images/evidence_claims.png)"
        blocks["costs"] = NO_RUN
        if draw_costs(images / "evidence_costs.png", same_text(points)):
            blocks["costs"] = "![Loss against four costs](images/evidence_costs.png)"
    _fill(page, blocks)
    if readme is not None and plan.claims:
        _fill(readme, {"headline": blocks["headline"]})


def _fill(page: Path, blocks: Mapping[str, str]) -> None:
    """Replace the content of these blocks."""
    text = page.read_text(encoding="utf-8")
    for name, content in blocks.items():
        block = re.compile(rf"(?s)(<!-- {name} -->\n).*?(<!-- end {name} -->)")
        if not block.search(text):
            raise UserError(f"{page}: has no place for {name}: <!-- {name} --> and <!-- end {name} -->")
        text = block.sub(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", text)  # type: ignore[misc]
    with writing(page) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def same_text(points: Mapping[str, Point]) -> list[Point]:
    """The points that were trained on as much text as those of the first experiment."""
    found = list(points.values())
    return [point for point in found if point.options["training.steps"] == found[0].options["training.steps"]]


def draw(name: str, experiment: Experiment, points: Mapping[str, Point], folder: Path) -> bool:
    """Draw the losses of an experiment's points and of the baselines from other experiments."""
    own = [full_name(name, point) for point in experiment.points]
    compared = [full_name(name, each) for pair in experiment.contrasts for each in pair]
    shown = [_of_seeds(points[each], experiment.seeds) for each in dict.fromkeys([*own, *compared]) if each in points]
    shown = [point for point in shown if point.runs]
    if not any(point in points for point in own):
        return False
    return draw_validation_by_point(folder / f"evidence_{name}.png", shown)
