"""Pictures of a report, as PNG files: one idea each, readable on a phone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from data_prep.files import writing
from launch.results import Point, Run, labels

# Names of points are shown as they are; with a dollar sign they would be read as formulas, and most refused.
plt.rcParams["text.parse_math"] = False

SIZE = (5.6, 4.0)
HEATMAPS = {
    "expert/load_max": "tokens of the busiest expert over the mean (1: balanced)",
    "neuron/usage_entropy": "entropy of how often neurons are kept (1: even)",
    "neuron/dead": "share of neurons that no token kept",
    "neuron/overlap": "share of most used neuron indices that two experts share",
}


def draw_losses(path: Path, points: Sequence[Point]) -> None:
    """Training loss over tokens: the mean over seeds, and their range as a band."""
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(points)))
    lowest, highest = math.inf, -math.inf
    for point, colour in zip(points, colours, strict=True):
        curves = [dict(_losses_by_tokens(run)) for run in point.counted]
        tokens = sorted(set[float]().union(*curves))
        if not tokens:
            continue
        losses = np.array([[curve.get(count, np.nan) for count in tokens] for curve in curves])
        millions = np.array(tokens) / 1e6
        axes.plot(millions, np.nanmean(losses, 0), color=colour, linewidth=1.4, label=point.name)
        axes.fill_between(millions, np.nanmin(losses, 0), np.nanmax(losses, 0), color=colour, alpha=0.2, linewidth=0)
        # The first steps fall so far that nothing else could be seen.
        late = losses[:, len(tokens) // 10 :]
        lowest, highest = min(lowest, np.nanmin(late)), max(highest, np.nanmax(late))
    if lowest < highest:
        axes.set_ylim(lowest - 0.03 * (highest - lowest), highest)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss, nats per token")
    axes.set_title(points[0].group, fontsize=10)
    axes.legend(fontsize=8)
    _save(figure, axes, path)


def draw_validation_by_ratio(path: Path, points: Sequence[Point]) -> None:
    """Validation loss against the share K/H of neurons that a token keeps."""
    figure, axes = _draw_validation(points, lambda point: point.ratio)
    axes.set_xscale("log", base=2)
    ratios = sorted({point.ratio for point in points})
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
    axes.set_xlabel("activation_ratio: share K/H of neurons that a token keeps")
    _save(figure, axes, path)


def draw_validation_by_active(path: Path, points: Sequence[Point]) -> None:
    """Validation loss against the routed experts' weights that a token touches; beside each point, their share."""
    figure, axes = _draw_validation(points, lambda point: point.parameters.active_experts / 1e6)
    for point in points:
        if point.validation.values:
            share = f"{point.parameters.active_expert_params:.0%}"
            at = (point.parameters.active_experts / 1e6, point.validation.mean)
            axes.annotate(share, at, textcoords="offset points", xytext=(7, 4), fontsize=8)
    axes.set_xlabel(
        "millions of routed experts' weights that a token touches\n(beside a point: active_expert_params, their share)"
    )
    axes.margins(x=0.12)
    _save(figure, axes, path)


def draw_validation_by_point(path: Path, points: Sequence[Point]) -> None:
    """Validation loss of each point, its seeds as dots."""
    shown = [point for point in points if point.validation.values]
    figure, axes = plt.subplots(figsize=(SIZE[0], 1.2 + 0.32 * len(shown)), layout="constrained")
    groups = list(dict.fromkeys(point.group for point in shown))
    for row, point in enumerate(shown):
        losses, colour = point.validation.values, f"C{groups.index(point.group)}"
        axes.plot(losses, [row] * len(losses), ".", color=colour, alpha=0.6)
        axes.plot([point.validation.mean], [row], "|", color=colour, markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(shown)), labels(shown), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("validation loss, nats per token")
    _save(figure, axes, path)


def draw_heatmap(path: Path, points: Sequence[Point], metric: str) -> bool:
    """A metric by point (rows) and layer (columns), the mean over seeds of the last record; False if it was not recorded."""
    layers = max(point.model.num_layers for point in points)
    values = np.full((len(points), layers), np.nan)
    for row, point in enumerate(points):
        for layer in range(point.model.num_layers):
            found = point.mean(f"{metric}/layer_{layer:02d}")
            values[row, layer] = np.nan if found is None else found
    if np.isnan(values).all():
        return False
    figure, axes = plt.subplots(figsize=(max(SIZE[0], 3.4 + 0.3 * layers), 1.2 + 0.3 * len(points)), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    if layers <= 8:
        for (row, layer), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value < middle else "black"
                axes.text(layer, row, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(0, layers, -(-layers // 12)))
    axes.set_xlabel("layer")
    axes.set_yticks(range(len(points)), labels(points), fontsize=8)
    figure.suptitle(HEATMAPS[metric], fontsize=9)
    figure.colorbar(image)
    _save(figure, axes, path, grid=False)
    return True


def _draw_validation(points: Sequence[Point], where: Any) -> tuple[Any, Any]:
    """Lines of series with their seeds as dots and the standard deviation over seeds as bars."""
    figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
    for number, series in enumerate(dict.fromkeys(point.series for point in points)):
        line = [point for point in points if point.series == series and point.validation.values]
        xs, means = [where(point) for point in line], [point.validation.mean for point in line]
        spreads = [0 if math.isnan(point.validation.spread) else point.validation.spread for point in line]
        axes.errorbar(xs, means, yerr=spreads, marker="o", markersize=5, capsize=3, color=f"C{number}", label=series)
        for point, x in zip(line, xs, strict=True):
            axes.plot([x] * len(point.validation.values), point.validation.values, ".", color=f"C{number}", alpha=0.5)
    axes.set_ylabel("validation loss, nats per token")
    axes.legend(fontsize=8)
    return figure, axes


def _losses_by_tokens(run: Run) -> list[tuple[float, float]]:
    return [(record["train/tokens"], record["train/loss"]) for record in run.records if record.get("train/loss") is not None]


def _save(figure: Any, axes: Any, path: Path, *, grid: bool = True) -> None:
    if grid:
        axes.grid(alpha=0.3)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
