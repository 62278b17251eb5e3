"""Writes a report of runs: a summary, loss curves, validation loss against k, experts and neurons by layer, tables.

    mone-report runs/k_sweep runs/k_sweep_equal_active --output report
    mone-report runs/demo runs/plain --baseline runs/plain
    mone-report runs/rates --tune optimizer.lr --tuning-seed 0

The command writes report/index.html, a page without external files, each chart as a PNG file, and a W&B run with the same
charts and tables. Runs that differ only in their seed form one point.
"""

import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch import charts
from launch.baselines import compare
from launch.contrasts import assess
from launch.findings import sentence
from launch.page import page
from launch.points import Point, Run
from launch.results import group_runs, labels, read_runs
from launch.tables import (
    tabulate_contrasts,
    tabulate_data,
    tabulate_evaluations,
    tabulate_points,
    tabulate_runs,
    tabulate_settings,
)
from launch.tuning import choose
from mone_common.console import Parser, ReportedError, UserError
from mone_common.files import writing
from mone_common.page import Chart, Table
from mone_common.run_records import flat
from mone_common.text import printable
from mone_common.wandb_runs import wandb_settings


def main() -> None:
    """Write the report; exit code 2 if there is nothing to report."""
    parser = Parser(prog="mone-report", description="Write a report that compares runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs or sweeps, e.g. runs/k_sweep")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder for the page and its charts (report)")
    parser.add_argument("--title", help="title of the page (the names of the sweeps and runs)")
    parser.add_argument(
        "--baseline",
        metavar="RUN_OR_OPTIONS",
        help="the baseline: the folder of a run (all its seeds count), or the options in which the baseline differs, "
        "e.g. model.neuron_balance_coeff=0 (model.activation_ratio=1, the plain MoE)",
    )
    parser.add_argument(
        "--margin",
        type=_positive,
        default=0.03,
        help="points are equivalent if their losses differ by less than this, nats per token (0.03)",
    )
    parser.add_argument(
        "--tune",
        metavar="OPTION",
        help="choose the value of this option, e.g. optimizer.lr, for each point by its runs with the tuning seed",
    )
    parser.add_argument("--tuning-seed", type=int, default=0, help="run.seed of these runs, which are not reported (0)")
    parser.add_argument(
        "--evaluation",
        metavar="NAME",
        help="report the loss of this result of mone-evaluate, evaluations/NAME.json, in place of the validation loss",
    )
    parser.add_argument(
        "--wandb",
        choices=("offline", "online", "disabled"),
        default="offline",
        help="write a W&B run with the same charts and tables (offline: `wandb sync OUTPUT/wandb/offline-run-*` uploads it)",
    )
    options = parser.parse_args()
    try:
        write_report(
            options.runs,
            options.output,
            title=options.title,
            wandb_mode=options.wandb,
            baseline=options.baseline,
            margin=options.margin,
            tune=options.tune,
            tuning_seed=options.tuning_seed,
            evaluation=options.evaluation,
        )
    except ReportedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return number


def write_report(
    folders: Sequence[Path],
    output: Path,
    *,
    title: str | None = None,
    wandb_mode: str = "disabled",
    baseline: str | None = None,
    margin: float = 0.03,
    tune: str | None = None,
    tuning_seed: int = 0,
    evaluation: str | None = None,
) -> None:
    """Read the runs, draw the charts, write the page; UserError if there are no runs or `output` cannot be written."""
    problems = list[str]()

    def warn(problem: str) -> None:
        if problem not in problems:  # several tables may read a damaged file
            problems.append(problem)
            print(problem, file=sys.stderr)

    of_baseline = Path(baseline) if baseline is not None and os.path.isdir(baseline) else None
    try:
        runs = read_runs([*folders, *([of_baseline] if of_baseline else [])], warn)
        if evaluation is not None:
            runs = evaluated(runs, evaluation)
        if tune is not None:
            runs = choose(runs, tune, seed=tuning_seed)
        points = group_runs(runs)
    except ValueError as error:
        raise UserError(str(error)) from error
    if of_baseline is not None:
        named = named_baseline(points, of_baseline)
        compared, against = compare(points, named=named), labels(points)[points.index(named)]
    elif baseline is not None:
        compared, against = compare(points, wanted=wanted_options(points, baseline)), baseline
    else:
        compared, against = compare(points), "the plain MoE"
    title = printable(title or ", ".join(dict.fromkeys(point.group or point.name for point in points)))
    finding = sentence(points, compared, against)
    try:
        losses, validation, layers = draw(points, output)
        tables = [
            tabulate_points(points, compared, against),
            *tabulate_contrasts(assess(points, compared, margin=margin)),
            *tabulate_settings(points),
            *tabulate_data(points),
            tabulate_runs(points),
            *tabulate_evaluations(points, warn),
        ]
        with writing(output / "index.html") as temporary:
            text = page(title, finding, points, problems, losses, validation, layers, tables)
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={printable(output)}: cannot be written ({error})") from error
    if wandb_mode != "disabled":
        send_to_wandb(points, [*losses, *validation, *layers], tables, output, wandb_mode)
    print(f"{printable(output)}/index.html  {len(runs)} runs, {len(points)} points; charts beside it as PNG files")
    print(finding)


def evaluated(runs: Sequence[Run], evaluation: str) -> list[Run]:
    """The runs with the loss of an evaluation; UserError unless all that have it scored the same documents."""
    texts = {run.evaluations[evaluation].sha256 for run in runs if evaluation in run.evaluations}
    if len(texts) != 1:
        problem = "no run has it" if not texts else "the runs scored different documents"
        raise UserError(f"--evaluation={printable(evaluation)}: {problem}")
    return [dataclasses.replace(run, evaluation=evaluation) for run in runs]


def named_baseline(points: Sequence[Point], folder: Path) -> Point:
    """The point whose runs are in this folder; UserError unless there is exactly one."""
    inside = [point for point in points if any(run.folder.resolve().is_relative_to(folder.resolve()) for run in point.runs)]
    if len(inside) != 1:
        names = ", ".join(labels(inside)) or "no readable run"
        raise UserError(
            f"--baseline={printable(folder)}: contains {len(inside)} points ({names}); give the folder of one run"
        )
    return inside[0]


def wanted_options(points: Sequence[Point], text: str) -> dict[str, Any]:
    """The options that `text` gives as `name=value` or `{name: value, ...}`; UserError if no point has them."""
    is_mapping = text.lstrip().startswith("{")
    try:
        wanted = OmegaConf.create(text) if is_mapping else OmegaConf.from_dotlist(text.split(","))
        options = flat(OmegaConf.to_container(wanted))  # type: ignore[arg-type]
    except (ValueError, AssertionError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(
            f"--baseline={printable(text)}: neither a folder nor options ({' '.join(str(error).split())})"
        ) from error
    known = {name for point in points for name in point.options}
    if unknown := [name for name in options if name not in known]:
        raise UserError(
            f"--baseline={printable(text)}: no such folder, and the points have no option "
            f"{', '.join(map(printable, unknown))}; give the folder of a run, or options such as model.activation_ratio=1"
        )
    if not any(all(point.options.get(name) == value for name, value in options.items()) for point in points):
        raise UserError(f"--baseline={printable(text)}: no run has these options")
    return options


def draw(points: Sequence[Point], output: Path) -> tuple[list[Chart], list[Chart], list[Chart]]:
    """Draw all charts: training loss, validation loss, and metrics by layer."""
    losses = list[Chart]()
    for group in dict.fromkeys(point.group for point in points):
        path = output / (f"training_loss_{len(losses) + 1}.png" if losses else "training_loss.png")
        members = [point for point in points if point.group == group]
        of = group or ", ".join(labels(members))
        if charts.draw_losses(
            path, members, "training loss" if len(members) > 1 and not group else f"training loss of {of}"
        ):
            losses.append(Chart(path, f"training loss of {of}: mean over seeds, and their range"))
    validation = []
    for name, draw_it, text in (
        ("by_ratio", charts.draw_validation_by_ratio, "against k: mean, standard deviation and single seeds"),
        ("by_active", charts.draw_validation_by_active, "against the experts' weights that a token touches"),
        ("by_point", charts.draw_validation_by_point, "of each point: mean and single seeds"),
    ):
        path = output / f"validation_{name}.png"
        if draw_it(path, points):
            validation.append(Chart(path, f"validation loss {text}"))
    layers = []
    for metric, text in charts.HEATMAPS.items():
        path = output / f"{metric.replace('/', '_')}.png"
        if charts.draw_heatmap(path, points, metric):
            layers.append(Chart(path, f"{metric} by layer: {text}"))
    return losses, validation, layers


def send_to_wandb(
    points: Sequence[Point], pictures: Sequence[Chart], tables: Sequence[Table], output: Path, mode: str
) -> None:
    """Log charts and tables to a W&B run in the group of the sweep; a later report on the same sweeps resumes that run."""
    import wandb

    groups = list(dict.fromkeys(point.group or point.name for point in points))
    options = points[0].runs[0].options
    try:
        run = wandb.init(
            project=options.get("logging.wandb_project"),
            entity=options.get("logging.wandb_entity"),
            group=points[0].group if len({point.group for point in points}) == 1 and points[0].group else None,
            job_type="report",
            name=f"report of {', '.join(groups)}",
            id=f"report-{hashlib.sha256(','.join(sorted(groups)).encode()).hexdigest()[:12]}",
            resume="allow",
            dir=str(output.absolute()),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb_settings(),
        )
        run.log(
            {
                f"table/{table.title}": wandb.Table(list(table.headings), [list(row) for row in table.rows])
                for table in tables
            }
        )
        run.log({f"chart/{picture.path.stem}": wandb.Image(str(picture.path), caption=picture.text) for picture in pictures})
        run.finish()
        wandb.teardown()
    except Exception as error:  # the page is written already: an error of W&B must not fail the command
        print(f"no W&B run of the report ({error})", file=sys.stderr)


if __name__ == "__main__":
    main()
