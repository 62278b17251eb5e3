"""Draws the charts of a report as PNG files.

Each draw_* returns False if there is nothing to draw. A chart shows at most MOST points, the first ones.
"""

import itertools
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from launch.claims import HOLDS, REFUTED, UNDECIDED
from launch.points import Point
from launch.results import labels
from launch.statistics import Contrast
from mone_common.figures import plt, save

WIDTH, HEIGHT = 4.0, 3.1
"""Inches: about the width of a phone, so that text has its nominal size there."""
SHARPNESS = 240
"""Dots per inch: two for each pixel at the largest size that the page shows."""
LETTERS = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8.5, "figure.titlesize": 9}
MOST, MOST_NUMBERS = 40, 8
"""Most points in a chart; most layers for which a heatmap prints its values."""
HEATMAPS = {
    "expert/load_max": "tokens of the busiest expert over the mean (1: balanced)",
    "neuron/usage_entropy": "entropy of how often neurons are kept (1: even)",
    "neuron/dead": "share of neurons that no token kept",
    "neuron/overlap": "share of most used neuron indices that two experts share",
}


def draw_losses(path: Path, points: Sequence[Point], title: str) -> bool:
    """Training loss over tokens: the mean over seeds, and their range as a band."""
    drawn = [(point, [dict(run.series("train/loss", "train/tokens")) for run in point.counted]) for point in points[:MOST]]
    drawn = [(point, curves) for point, curves in drawn if any(curves)]
    if not drawn:
        return False
    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        names = dict(zip(map(id, points), labels(points), strict=True))
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(drawn)))
        lowest, highest = math.inf, -math.inf
        for (point, curves), colour in zip(drawn, colours, strict=True):
            tokens = sorted(set[float]().union(*curves))
            losses = np.array([[curve.get(count, np.nan) for count in tokens] for curve in curves])
            millions = np.array(tokens) / 1e6
            axes.plot(millions, np.nanmean(losses, 0), color=colour, linewidth=1.4, label=_legend(names[id(point)]))
            axes.fill_between(millions, np.nanmin(losses, 0), np.nanmax(losses, 0), color=colour, alpha=0.2, linewidth=0)
            # The loss falls so far in the first steps that it would hide all differences.
            late = losses[:, len(tokens) // 10 :]
            lowest, highest = min(lowest, np.nanmin(late)), max(highest, np.nanmax(late))
        if lowest < highest:
            axes.set_ylim(lowest - 0.03 * (highest - lowest), highest)
        axes.set_xlabel("million tokens")
        axes.set_ylabel("training loss, nats per token")
        axes.set_title(textwrap.fill(title, 50))
        _explain(axes, len(drawn))
        _save(figure, axes, path)
    return True


def draw_validation_by_ratio(path: Path, points: Sequence[Point]) -> bool:
    """Validation loss against the share K/H of neurons that a token keeps."""
    ratios = sorted({point.ratio for point in points if point.validation.values})
    if len(ratios) < 2:
        return False
    with plt.rc_context(LETTERS):
        figure, axes = _draw_validation(points, lambda point: point.ratio)
        axes.set_xscale("log", base=2)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(FixedLocator(_apart(ratios)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axes.set_xlabel("activation_ratio: share K/H of neurons\nthat a token keeps")
        _save(figure, axes, path)
    return True


def draw_validation_by_active(path: Path, points: Sequence[Point]) -> bool:
    """Validation loss against the number of active expert weights; a label at each point gives their share."""
    shown = [point for point in points if point.validation.values]
    if len(shown) < 2:
        return False
    with plt.rc_context(LETTERS):
        figure, axes = _draw_validation(shown, lambda point: point.parameters.active_experts / 1e6)
        for point in shown[:MOST]:
            share = f"{point.parameters.active_expert_params:.0%}"
            at = (point.parameters.active_experts / 1e6, point.validation.mean)
            axes.annotate(share, at, textcoords="offset points", xytext=(7, 4), fontsize=8)
        axes.set_xlabel(
            "millions of expert weights that a token touches\n(beside a point their share, active_expert_params)"
        )
        axes.margins(x=0.2, y=0.1)
        _save(figure, axes, path)
    return True


def draw_validation_by_point(path: Path, points: Sequence[Point]) -> bool:
    """Validation loss of each point, with its seeds as dots."""
    names = [(point, name) for point, name in zip(points, labels(points), strict=True) if point.validation.values][:MOST]
    if not names:
        return False
    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + _row_height(names) * len(names)), layout="constrained")
        groups = list(dict.fromkeys(point.group for point, _ in names))
        for row, (point, _) in enumerate(names):
            losses, colour = point.validation.values, f"C{groups.index(point.group)}"
            axes.plot(losses, [row] * len(losses), ".", color=colour, alpha=0.6)
            axes.plot([point.validation.mean], [row], "|", color=colour, markersize=12, markeredgewidth=2)
        axes.set_yticks(range(len(names)), [_fold(name) for _, name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("validation loss, nats per token")
        _save(figure, axes, path)
    return True


COSTS: dict[str, Callable[[Point], float]] = {
    "million parameters": lambda point: point.parameters.total / 1e6,
    "million active parameters": lambda point: point.parameters.active / 1e6,
    "million training FLOPs per token, as owed": lambda point: point.training_flops.sparse / 1e6,
    "minutes of training on one core": lambda point: (
        statistics.fmean(run.undisturbed_seconds or math.nan for run in point.complete) / 60
    ),
}
"""What a point costs."""


def draw_costs(path: Path, points: Sequence[Point]) -> bool:
    """Validation loss against each of the COSTS: the mean over seeds, with their standard deviation as error bars."""
    names = [(point, name) for point, name in zip(points, labels(points), strict=True) if point.validation.values][:MOST]
    if not names:
        return False
    with plt.rc_context(LETTERS):
        rows, groups = math.ceil(len(COSTS) / 2), list(dict.fromkeys(point.group for point, _ in names))
        size = (2 * WIDTH, rows * HEIGHT + 0.2 * math.ceil(len(names) / 3))
        figure, panels = plt.subplots(rows, 2, figsize=size, sharey=True, layout="constrained")
        for axes, (axis_label, cost) in zip(panels.flat, COSTS.items(), strict=True):
            for number, (point, name) in enumerate(names):
                spread = 0 if math.isnan(point.validation.spread) else point.validation.spread
                marker = "osD^vP*X"[groups.index(point.group) % 8]
                look = {"color": f"C{number % 10}", "marker": marker, "markersize": 6, "elinewidth": 0.8, "capsize": 2}
                axes.errorbar(
                    [cost(point)], [point.validation.mean], yerr=[spread], linestyle="", label=_legend(name), **look
                )
            axes.set_xlabel(axis_label)
            axes.margins(x=0.1, y=0.1)
            axes.grid(alpha=0.3)
        for axes in panels[:, 0]:
            axes.set_ylabel("held-out loss, nats per token")
        entries = panels.flat[0].get_legend_handles_labels()
        figure.legend(*entries, loc="outside lower center", ncols=3)
        save(figure, path, dots=SHARPNESS)
    return True


OUTCOME_STYLES = {HOLDS: ("C2", "o"), REFUTED: ("C3", "X"), UNDECIDED: ("0.5", "s")}
"""Colour and marker of each outcome of a test of a claim."""


def draw_claims(path: Path, tests: Sequence[tuple[str, Contrast, str]], margin: float) -> bool:
    """Each claim with its difference, the 95 % interval and, by colour and marker, the outcome.

    tests: claims with their tests and outcomes.
    """
    if not tests:
        return False
    names = [textwrap.fill(claim, 62) for claim, _, _ in tests]
    with plt.rc_context(LETTERS):
        lines = [name.count("\n") + 1 for name in names]
        size = (2 * WIDTH, 1.0 + 0.08 * len(names) + 0.16 * sum(lines))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        axes.axvspan(-margin, margin, color="0.92", linewidth=0)
        axes.axvline(0, color="0.4", linewidth=0.8)
        rows = np.cumsum([0, *(0.5 + (above + below) / 2 for above, below in itertools.pairwise(lines))])
        for row, (_, test, outcome) in zip(rows, tests, strict=True):
            colour, marker = OUTCOME_STYLES[outcome]
            ends = [[test.mean - test.low], [test.high - test.mean]]
            axes.errorbar([test.mean], [row], xerr=ends, color=colour, marker=marker, capsize=3, label=outcome)
        axes.set_yticks(rows, names)
        axes.set_ylim(rows[-1] + 1, -1)
        axes.set_xlabel(
            f"difference in held-out loss, nats per token\n(grey: ±{margin:g}; left of 0: lower loss than the baseline)"
        )
        entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(entries.values(), entries.keys(), loc="outside upper right", ncols=3)
        _save(figure, axes, path)
    return True


def draw_heatmap(path: Path, points: Sequence[Point], metric: str) -> bool:
    """A metric by point (rows) and layer (columns): the mean over seeds of the last record.

    A plain MoE keeps every neuron, so its neuron metrics are constants: its rows are grey, and the colour scale covers the
    other rows.
    """
    names = [(point, name) for point, name in zip(points, labels(points), strict=True)][:MOST]
    layers = max(point.layers(metric) for point, _ in names)
    if layers == 0:
        return False
    found = [[point.mean(f"{metric}/layer_{layer:02d}") for layer in range(layers)] for point, _ in names]
    values = np.array(found, dtype=float)
    plain = np.array([metric.startswith("neuron/") and point.ratio == 1 for point, _ in names])
    if np.isnan(values).all():
        return False
    absent = np.isnan(values)
    grey = absent if (absent | plain[:, None]).all() else absent | plain[:, None]
    coloured = np.ma.masked_array(values, grey)
    lowest, highest = float(coloured.min()), float(coloured.max())
    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, 1.1 + _row_height(names) * len(names)), layout="constrained")
        palette = plt.get_cmap("viridis").with_extremes(bad="0.92")
        image = axes.imshow(coloured, aspect="auto", cmap=palette, vmin=lowest, vmax=highest, interpolation="nearest")
        if layers <= MOST_NUMBERS:
            for (row, layer), value in np.ndenumerate(values):
                dark = not grey[row, layer] and value <= (lowest + highest) / 2
                if not np.isnan(value):
                    text = f"{value:.3g}" if layers <= 6 else f"{value:.2g}"
                    axes.text(layer, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
        else:
            for row in np.flatnonzero(plain & grey.all(1)):
                axes.text((layers - 1) / 2, row, "plain MoE", ha="center", va="center", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("layer")
        axes.set_yticks(range(len(names)), [_fold(name) for _, name in names])
        title = HEATMAPS[metric]
        if lowest == highest:
            # All values are equal: a colour bar would show a range that does not exist.
            title += f": {lowest:.3g} everywhere"
        else:
            figure.colorbar(image, ticks=MaxNLocator(4))
        if (plain & grey.all(1)).any():
            title += "; grey: plain MoE, which keeps every neuron"
        figure.suptitle(textwrap.fill(title, 58))
        _save(figure, axes, path, grid=False)
    return True


def _draw_validation(points: Sequence[Point], where: Callable[[Point], float]) -> tuple[Any, Any]:
    """One line for each series, with seeds as dots and the standard deviation over seeds as error bars."""
    figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
    shown = [point for point in points if point.validation.values]
    series = list(dict.fromkeys(point.series for point in shown))[:MOST]
    for number, name in enumerate(series):
        line = [point for point in shown if point.series == name]
        xs, means = [where(point) for point in line], [point.validation.mean for point in line]
        spreads = [0 if math.isnan(point.validation.spread) else point.validation.spread for point in line]
        colour = f"C{number % 10}"
        axes.errorbar(xs, means, yerr=spreads, marker="o", markersize=4, capsize=3, color=colour, label=_legend(name))
        for point, x in zip(line, xs, strict=True):
            axes.plot([x] * len(point.validation.values), point.validation.values, ".", color=colour, alpha=0.5)
    axes.set_ylabel("validation loss, nats per token")
    _explain(axes, len(series))
    return figure, axes


def _explain(axes: Any, entries: int) -> None:
    """Add a legend if there are several entries and it does not cover the chart."""
    if 1 < entries <= 12:
        axes.legend(handlelength=1.2, borderaxespad=0.3, framealpha=0.7)


def _legend(name: str) -> str:
    """A legend entry; matplotlib omits labels that begin with an underscore."""
    short = textwrap.shorten(name, 40, placeholder="…") if " " in name else name if len(name) <= 40 else f"{name[:39]}…"
    return f" {short}" if short.startswith("_") else short


def _fold(name: str) -> str:
    """Wrap a name into at most three lines of 24 characters, at the ends of its parts."""
    lines = [""]
    for part in name.replace(",", ",\n").replace(": ", ":\n").splitlines():
        for piece in textwrap.wrap(part, 24) or [part]:
            lines = [*lines[:-1], lines[-1] + piece] if len(lines[-1]) + len(piece) <= 24 else [*lines, piece]
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], lines[2][:23] + "…"]).strip("\n")


def _row_height(names: Sequence[tuple[Point, str]]) -> float:
    """Height of the tallest label, in inches."""
    return 0.12 + 0.15 * max(_fold(name).count("\n") + 1 for _, name in names)


def _apart(ratios: Sequence[float]) -> list[float]:
    """Ratios whose labels do not overlap on a logarithmic axis."""
    chosen = [ratios[-1]]
    for ratio in ratios[-2::-1]:
        if math.log2(chosen[-1] / ratio) >= math.log2(ratios[-1] / ratios[0]) / 7:
            chosen.append(ratio)
    return chosen


def _save(figure: Any, axes: Any, path: Path, *, grid: bool = True) -> None:
    if grid:
        axes.grid(alpha=0.3)
    save(figure, path, dots=SHARPNESS)
