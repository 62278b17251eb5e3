"""Writes a report of runs: a summary, loss curves, validation loss against k, experts and neurons by layer, tables.

    mone-report runs/k_sweep runs/k_sweep_equal_active --output report
    mone-report runs/demo runs/plain --baseline runs/plain

The command writes report/index.html, a page without external files, each chart as a PNG file, and a W&B run with the same
charts and tables. Runs that differ only in their seed form one point.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch import charts
from launch.baselines import Comparison, compare
from launch.findings import sentence
from launch.page import page
from launch.points import Point
from launch.results import format_value, group_runs, labels, read_runs, short_name, varying_options
from mone_common.console import Parser, ReportedError, UserError
from mone_common.files import writing
from mone_common.page import Chart, Table
from mone_common.run_records import flat, last_step
from mone_common.text import printable
from mone_common.wandb_runs import wandb_settings
from mone_eval.results import read_evaluations, score_rows


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
        "--wandb",
        choices=("offline", "online", "disabled"),
        default="offline",
        help="write a W&B run with the same charts and tables (offline: `wandb sync OUTPUT/wandb/offline-run-*` uploads it)",
    )
    options = parser.parse_args()
    try:
        write_report(options.runs, options.output, options.title, options.wandb, options.baseline)
    except ReportedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def write_report(
    folders: Sequence[Path], output: Path, title: str | None, wandb_mode: str, baseline: str | None = None
) -> None:
    """Read the runs, draw the charts, write the page; UserError if there are no runs or `output` cannot be written."""
    problems = list[str]()

    def warn(problem: str) -> None:
        problems.append(problem)
        print(problem, file=sys.stderr)

    of_baseline = Path(baseline) if baseline is not None and os.path.isdir(baseline) else None
    try:
        runs = read_runs([*folders, *([of_baseline] if of_baseline else [])], warn)
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


def tabulate_points(points: Sequence[Point], compared: Sequence[Comparison | None], against: str) -> Table:
    """Size, results and cost of each point; against: name of the baseline."""
    rows = []
    names = labels(points)
    name_of = dict(zip(map(id, points), names, strict=True))
    for label, point, comparison in zip(names, points, compared, strict=True):
        parameters, speeds = point.parameters, [run.tokens_per_second for run in point.runs if run.tokens_per_second]
        memory = [run.peak_gib for run in point.runs if run.peak_gib]
        rows.append(
            (
                label,
                f"{len(point.complete)} of {len(point.runs)}",
                str(point.validation),
                "-" if comparison is None or not comparison.difference.values else _difference(comparison),
                "-" if comparison is None else _baseline(comparison, name_of[id(comparison.base)]),
                f"{point.ratio:g}",
                f"{point.model.active_neurons} of {point.model.moe_ffn_hidden_size}",
                f"{parameters.active_expert_params:.1%}",
                f"{parameters.active_moe_params:.1%}",
                f"{parameters.active_experts / 1e6:.2f}M",
                f"{parameters.active / 1e6:.2f}M of {parameters.total / 1e6:.2f}M",
                f"{point.training_flops / 1e6:,.1f}M",
                f"{sum(speeds) / len(speeds):,.0f}" if speeds else "-",
                f"{max(memory):.2f}" if memory else "-",
            )
        )
    return Table(
        "Points",
        "Validation loss in nats per token: mean ± standard deviation over the seeds of complete runs. "
        f"Over {against}: the difference to the baseline, which has the same value of all other options that affect the "
        "result. Runs with the same seed are compared, because they read the same data in the same order; unpaired: the "
        "difference of the means, if no seed is common. Tokens per second: median; other load on the machine lowers it.",
        (
            *("point", "complete", "validation loss", f"over {against}", "baseline", "activation_ratio", "K of H neurons"),
            *("active_expert_params", "active_moe_params", "active expert weights", "active weights"),
            *("training FLOPs a token", "tokens/s", "peak GiB"),
        ),
        rows,
    )


def tabulate_settings(points: Sequence[Point]) -> list[Table]:
    """The options that differ between points; no table if none do."""
    varying = varying_options([point.options for point in points])
    if not varying:
        return []
    rows = [(label, *(format_value(values[row]) for values in varying.values())) for row, label in enumerate(labels(points))]
    return [Table("Settings that differ", "All other options are the same in all points.", ("point", *varying), rows)]


def tabulate_data(points: Sequence[Point]) -> list[Table]:
    """Tokens and epochs of each source, for each point; no table if no run has recorded them."""
    rows = []
    for label, point in zip(labels(points), points, strict=True):
        for source in next((run.reading for run in point.runs if run.reading), []):
            read, tokens = (f"{source[name] / 1e6:,.2f}M" for name in ("read", "tokens"))
            rows.append(
                (label, printable(source["name"]), f"{source['share']:.1%}", tokens, read, f"{source['epochs']:.2f}")
            )
    headings = ("point", "source", "share of the blend", "training tokens", "tokens read", "epochs")
    return [Table("Data", "Epochs: how often a complete run reads a source.", headings, rows)] if rows else []


def tabulate_runs(points: Sequence[Point]) -> Table:
    """One row for each run."""
    rows = []
    for point in points:
        for run in point.runs:
            loss, step = run.validation_loss, last_step(run.records)
            rows.append(
                (
                    printable(run.folder),
                    printable(run.state),
                    f"{step} of {run.options['training.steps']:g}",
                    run.seed,
                    "-" if loss is None else f"{loss:.4f}",
                    f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "-",
                    f"{run.peak_gib:.2f}" if run.peak_gib else "-",
                    run.commit,
                )
            )
    headings = ("run", "state", "step", "seed", "validation loss", "tokens/s", "peak GiB", "commit")
    return Table("Runs", "", headings, rows)


def tabulate_evaluations(points: Sequence[Point], warn: Callable[[str], None]) -> list[Table]:
    """The scores of mone-evaluate in the folders of the runs; no table if there are none.

    warn: called with a message for a run with a file that is no result.
    """
    rows = []
    for run in (run for point in points for run in point.runs):
        try:
            for name, result in read_evaluations(run.folder):
                model = result.get("model", {})
                where = (printable(run.folder), printable(name), printable(Path(model.get("source", "-")).name))
                ratio = format_value(model.get("activation_ratio"))
                rows += [(*where, ratio, *map(printable, scores)) for scores in score_rows(result)]
        except UserError as error:
            warn(str(error))
    headings = ("run", "evaluation", "checkpoint", "activation_ratio", "text or task", "score", "value")
    return [Table("Evaluations", "Values have an interval of 95 % or a standard error.", headings, rows)] if rows else []


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


def _difference(comparison: Comparison) -> str:
    text = str(comparison.difference)
    return (text if text.startswith("-") else f"+{text}") + ("" if comparison.paired else " (unpaired)")


def _baseline(comparison: Comparison, name: str) -> str:
    """Name of the baseline, and the other options that differ."""
    others = [f"{short_name(option)} {format_value(theirs)}" for option, (_, theirs) in comparison.other_options.items()]
    return f"{name}, with {', '.join(others)}" if others else name


if __name__ == "__main__":
    main()
