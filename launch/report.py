"""One page of what runs came to: curves, validation loss against k, experts and neurons by layer, tables.

    python -m launch.report runs/k_sweep runs/k_sweep_equal_active --output report

writes report/index.html, which needs nothing beside itself and no network, each chart as a PNG file, and a W&B run with the
same charts and tables. Runs that differ in their seed alone are one point.
"""

import argparse
import base64
import datetime
import hashlib
import html
import shlex
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.console import ReportedError, UserError
from configs.run_folder import last_step
from data_prep.files import writing
from launch import charts
from launch.results import Point, baselines, group_runs, labels, read_runs, shown, varying_options
from train.metrics import wandb_settings


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    title: str
    note: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Chart:
    """A PNG file, and what it shows."""

    path: Path
    text: str


def main() -> None:
    """Write the report; exit code 2 if there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m launch.report", description="Write a page of what runs came to.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs or of sweeps, e.g. runs/k_sweep")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder of the page and its charts (report)")
    parser.add_argument("--title", help="of the page (the names of the sweeps)")
    parser.add_argument(
        "--wandb",
        choices=("offline", "online", "disabled"),
        default="offline",
        help="a W&B run with the same charts and tables (offline: `wandb sync OUTPUT/wandb/offline-run-*` uploads it)",
    )
    options = parser.parse_args()
    try:
        write_report(options.runs, options.output, options.title, options.wandb)
    except ReportedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def write_report(folders: Sequence[Path], output: Path, title: str | None, wandb_mode: str) -> None:
    """Read the runs, draw, write the page; UserError if there are none or the folder cannot be written."""
    try:
        runs = read_runs(folders)
        points = group_runs(runs)
    except ValueError as error:
        raise UserError(str(error)) from error
    title = title or ", ".join(dict.fromkeys(point.group for point in points))
    try:
        losses, validation, layers = draw(points, output)
        tables = [tabulate_points(points), tabulate_settings(points), tabulate_runs(points)]
        if (data := tabulate_data(points)).rows:
            tables.insert(2, data)
        with writing(output / "index.html") as temporary:
            temporary.write_text(page(title, points, losses, validation, layers, tables), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error})") from error
    if wandb_mode != "disabled":
        send_to_wandb(points, [*losses, *validation, *layers], tables, output, wandb_mode)
    print(f"{output}/index.html  {len(runs)} runs, {len(points)} points; charts beside it as PNG files")


def draw(points: Sequence[Point], output: Path) -> tuple[list[Chart], list[Chart], list[Chart]]:
    """Charts of training losses, of validation, and by layer."""
    losses = []
    for number, group in enumerate(dict.fromkeys(point.group for point in points)):
        path = output / ("training_loss.png" if number == 0 else f"training_loss_{number + 1}.png")
        charts.draw_losses(path, [point for point in points if point.group == group])
        losses.append(Chart(path, f"training loss of {group}: mean over seeds, and their range"))
    validation = []
    if any(point.validation.values for point in points):
        if len({point.ratio for point in points}) > 1:
            path = output / "validation_by_ratio.png"
            charts.draw_validation_by_ratio(path, points)
            validation.append(Chart(path, "validation loss against k: mean, standard deviation and single seeds"))
            path = output / "validation_by_active.png"
            charts.draw_validation_by_active(path, points)
            validation.append(Chart(path, "validation loss against the experts' weights that a token touches"))
        path = output / "validation_by_point.png"
        charts.draw_validation_by_point(path, points)
        validation.append(Chart(path, "validation loss of each point: mean and single seeds"))
    layers = []
    for metric, text in charts.HEATMAPS.items():
        path = output / f"{metric.replace('/', '_')}.png"
        if charts.draw_heatmap(path, points, metric):
            layers.append(Chart(path, f"{metric} by layer: {text}"))
    return losses, validation, layers


def tabulate_points(points: Sequence[Point]) -> Table:
    """What each point is, came to, and cost."""
    plain = baselines(points)
    rows = []
    for label, point in zip(labels(points), points, strict=True):
        base = plain.get(point.series)
        difference = point.difference(base) if base is not None and base is not point else None
        parameters, speeds = point.parameters, [run.tokens_per_second for run in point.runs if run.tokens_per_second]
        memory = [run.peak_gib for run in point.runs if run.peak_gib]
        rows.append(
            (
                label,
                f"{len(point.complete)} of {len(point.runs)}",
                str(point.validation),
                "-" if difference is None or not difference.values else _signed(str(difference)),
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
        "Validation loss in nats per token: mean ± standard deviation over the seeds of complete runs. Over the plain MoE: "
        "the difference to the point of the same series with activation_ratio 1, seed by seed, since runs of one seed read "
        "the same data in the same order. Tokens per second are medians, and as good as the machine was quiet.",
        (
            *("point", "complete", "validation loss", "over the plain MoE", "activation_ratio", "K of H neurons"),
            *("active_expert_params", "active_moe_params", "active expert weights", "active weights"),
            *("training FLOPs a token", "tokens/s", "peak GiB"),
        ),
        rows,
    )


def tabulate_settings(points: Sequence[Point]) -> Table:
    """The options that are not the same in all points."""
    varying = varying_options([point.options for point in points])
    rows = [(label, *(shown(values[row]) for values in varying.values())) for row, label in enumerate(labels(points))]
    return Table("Settings that differ", "All other options are the same in all points.", ("point", *varying), rows)


def tabulate_data(points: Sequence[Point]) -> Table:
    """What the runs of each point read of each source, and how often."""
    rows = []
    for label, point in zip(labels(points), points, strict=True):
        for source in next((run.reading for run in point.runs if run.reading), []):
            read, tokens = (f"{source[name] / 1e6:,.2f}M" for name in ("read", "tokens"))
            rows.append((label, source["name"], f"{source['share']:.1%}", tokens, read, f"{source['epochs']:.2f}"))
    headings = ("point", "source", "share of the blend", "training tokens", "tokens read", "epochs")
    return Table("Data", "Epochs: how often a whole run reads a source.", headings, rows)


def tabulate_runs(points: Sequence[Point]) -> Table:
    """One line a run."""
    rows = []
    for point in points:
        for run in point.runs:
            loss, step = run.validation_loss, last_step(run.records)
            rows.append(
                (
                    str(run.folder),
                    run.state,
                    f"{step} of {run.options['training.steps']}",
                    str(run.seed),
                    "-" if loss is None else f"{loss:.4f}",
                    f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "-",
                    f"{run.peak_gib:.2f}" if run.peak_gib else "-",
                    run.commit,
                )
            )
    headings = ("run", "state", "step", "seed", "validation loss", "tokens/s", "peak GiB", "commit")
    return Table("Runs", "", headings, rows)


def page(
    title: str,
    points: Sequence[Point],
    losses: Sequence[Chart],
    validation: Sequence[Chart],
    layers: Sequence[Chart],
    tables: Sequence[Table],
) -> str:
    """The whole page; images are in it."""
    runs = [run for point in points for run in point.runs]
    parts = []
    if incomplete := [run for run in runs if run.state != "complete"]:
        states = [run.state for run in incomplete]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        parts.append(f'<p class="warning">{len(incomplete)} of {len(runs)} runs are not complete ({counts}): '
                     "no validation loss of theirs counts here.</p>")  # fmt: skip
    for heading, those in (("Validation loss", validation), ("Training loss", losses), ("Experts and neurons", layers)):
        if those:
            parts += [f"<h2>{heading}</h2>", '<div class="charts">', *map(_figure, those), "</div>"]
    parts += [_details(point, label) for point, label in zip(points, labels(points), strict=True)]
    parts += [_html_table(table) for table in tables]
    command = shlex.join(["python", "-m", "launch.report", *sys.argv[1:]])
    made = f"Made {datetime.datetime.now().isoformat(sep=' ', timespec='minutes')} by <code>{html.escape(command)}</code>"
    template = string.Template((Path(__file__).parent / "templates/report.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), made=made, body="\n".join(parts))


def send_to_wandb(
    points: Sequence[Point], pictures: Sequence[Chart], tables: Sequence[Table], output: Path, mode: str
) -> None:
    """The same charts and tables as a W&B run in the group of the sweep; a report made again continues its run."""
    import wandb

    groups = list(dict.fromkeys(point.group for point in points))
    options = points[0].runs[0].options
    try:
        run = wandb.init(
            project=options["logging.wandb_project"],
            entity=options["logging.wandb_entity"],
            group=groups[0] if len(groups) == 1 else None,
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
    except Exception as error:  # whatever W&B raises, the page is there
        print(f"no W&B run of the report ({error})", file=sys.stderr)


def _figure(chart: Chart) -> str:
    data = base64.b64encode(chart.path.read_bytes()).decode()
    return f'<figure><img alt="{html.escape(chart.text)}" src="data:image/png;base64,{data}"></figure>'


def _details(point: Point, label: str) -> str:
    """The pictures that a run drew of its experts and neurons, of the first seed that has them."""
    for run in point.runs:
        drawn = [path for name in ("expert_load", "neuron_use") if (path := run.folder / f"figures/{name}.png").exists()]
        if drawn:
            pictures = "".join(_figure(Chart(path, f"{path.stem} of {label}")) for path in drawn)
            summary = html.escape(f"{label}, seed {run.seed}: experts and neurons one by one")
            return f'<details><summary>{summary}</summary><div class="charts">{pictures}</div></details>'
    return ""


def _signed(text: str) -> str:
    return text if text.startswith("-") else f"+{text}"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in table.headings)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>{note}<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


if __name__ == "__main__":
    main()
