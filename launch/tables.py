"""The tables of a report."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.baselines import Comparison
from launch.contrasts import Assessment
from launch.points import Point
from launch.results import format_value, labels, short_name, varying_options
from mone_common.console import UserError
from mone_common.page import Table
from mone_common.run_records import last_step
from mone_common.text import clock, printable
from mone_eval.results import read_evaluations, score_rows


def tabulate_points(points: Sequence[Point], compared: Sequence[Comparison | None], against: str) -> Table:
    """Size, results and cost of each point; against: name of the baseline."""
    rows = []
    names = labels(points)
    name_of = dict(zip(map(id, points), names, strict=True))
    for label, point, comparison in zip(names, points, compared, strict=True):
        parameters, speeds = point.parameters, [run.tokens_per_second for run in point.runs if run.tokens_per_second]
        memory = [run.peak_gib for run in point.runs if run.peak_gib]
        seconds = [run.seconds for run in point.counted if run.seconds]
        rows.append(
            (
                label,
                f"{len(point.complete)} of {len(point.runs)}",
                str(point.validation),
                "-" if comparison is None or not comparison.difference.values else _difference(comparison),
                "-" if comparison is None else _baseline(comparison, name_of[id(comparison.base)]),
                f"{point.ratio:g}",
                f"{point.model.describe_active_neurons()} of {point.model.moe_ffn_hidden_size}",
                f"{parameters.active_expert_params:.1%}",
                f"{parameters.active_moe_params:.1%}",
                f"{parameters.active_experts / 1e6:.2f}M",
                f"{parameters.active / 1e6:.2f}M of {parameters.total / 1e6:.2f}M",
                f"{point.training_flops.sparse / 1e6:,.1f}M of {point.training_flops.dense / 1e6:,.1f}M",
                f"{sum(speeds) / len(speeds):,.0f}" if speeds else "-",
                clock(statistics.fmean(seconds)) if seconds else "-",
                f"{max(memory):.2f}" if memory else "-",
            )
        )
    return Table(
        "Points",
        "Validation loss in nats per token: mean ± standard deviation over the seeds of complete runs. "
        f"Over {against}: the difference to the baseline, which has the same value of all other options that affect the "
        "result. Runs with the same seed are compared, because they read the same data in the same order; unpaired: the "
        "difference of the means, if no seed is common. Training FLOPs: owed by the mathematics, of those of dense kernels. "
        "Tokens per second: median; other load on the machine lowers it. Time: all tokens at that speed.",
        (
            *("point", "complete", "validation loss", f"over {against}", "baseline", "activation_ratio", "K of H neurons"),
            *("active_expert_params", "active_moe_params", "active expert weights", "active weights"),
            *("training FLOPs a token", "tokens/s", "time", "peak GiB"),
        ),
        rows,
    )


def tabulate_contrasts(contrasts: Sequence[Assessment]) -> list[Table]:
    """Intervals and tests of each paired difference; no table without contrasts."""
    if not contrasts:
        return []
    margin = contrasts[0].test.margin
    rows = [
        (
            found.name,
            found.base,
            str(found.test.pairs),
            f"{found.test.mean:+.4f}",
            f"{found.test.low:+.4f} to {found.test.high:+.4f}",
            "-" if found.over_documents is None else "{:+.4f} to {:+.4f}".format(*found.over_documents),
            f"{found.test.p:.2g}",
            "-" if math.isnan(found.p_holm) else f"{found.p_holm:.2g}",
            f"{'yes' if found.test.equivalent else 'not shown'} ({found.test.p_equivalent:.2g})",
            "-" if math.isnan(found.tokens_saved) else f"{found.tokens_saved:+.0%}",
        )
        for found in contrasts
    ]
    note = (
        "Differences of the loss between runs with the same seed, nats per token. Intervals of 95 %: over seeds (Student's "
        "t), and over seeds and documents (bootstrap). p: of no difference, alone and with Holm's correction for all "
        f"rows. Equivalent: the difference is within ±{margin:g} (two one-sided tests, p in parentheses). Tokens saved: "
        "what the difference is worth at the slope of the baseline's loss curve over the logarithm of tokens, second half."
    )
    headings = (
        *("point", "baseline", "pairs", "difference", "over seeds", "over seeds and documents", "p", "p (Holm)"),
        *(f"equivalent within ±{margin:g}", "tokens saved"),
    )
    return [Table("Differences", note, headings, rows)]


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


def _difference(comparison: Comparison) -> str:
    text = str(comparison.difference)
    return (text if text.startswith("-") else f"+{text}") + ("" if comparison.paired else " (unpaired)")


def _baseline(comparison: Comparison, name: str) -> str:
    """Name of the baseline, and the other options that differ."""
    others = [f"{short_name(option)} {format_value(theirs)}" for option, (_, theirs) in comparison.other_options.items()]
    return f"{name}, with {', '.join(others)}" if others else name
