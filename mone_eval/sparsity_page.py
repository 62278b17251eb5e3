"""Charts and page of a sparsification study, from the content of its results.json."""

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mone_common.figures import plt, save
from mone_common.page import Chart, Table, chart_section, html_table, render

WIDTH, HEIGHT = 4.4, 3.3
"""Inches."""
SHARPNESS = 240
RAREST = 1e-4
"""Smallest share of neurons that the chart of the gates shows."""
PARTS = {"routed": "routed experts", "shared": "shared experts", "dense": "dense layers"}
CONTROLS = {
    "abs_gate_up": "K best by |act(gate) up|",
    "preactivation": "K best by |gate|",
    "random": "K at random",
    "static": "K most used",
}
PLAIN = FuncFormatter(lambda number, _: f"{number:.3g}")
"""Numbers without formulas, which are switched off (mone_common/figures.py)."""
LETTERS = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8}


def write_page(folder: Path, result: dict[str, Any]) -> None:
    """Write index.html and its charts."""
    charts = folder / "charts"
    charts.mkdir(exist_ok=True)
    losses, gates, tasks = [], [], []
    for part in parts_of(result):
        path = charts / f"loss_{part}.png"
        draw_losses(path, result, part)
        losses.append(Chart(path, f"Loss against the share of neurons kept in {PARTS[part]}, with 95 % intervals"))
        for name, text, draw in (
            ("gates", f"Distribution of |act(gate)| in {PARTS[part]} by layer", draw_gates),
            ("thresholds", f"Thresholds of {PARTS[part]} by layer", draw_thresholds),
            ("kept", f"Share of neurons above the thresholds in {PARTS[part]} by layer", draw_kept),
        ):
            path = charts / f"{name}_{part}.png"
            if draw(path, result, part):
                gates.append(Chart(path, text))
    if draw_tasks(charts / "tasks.png", result):
        tasks.append(Chart(charts / "tasks.png", "Mean score of the tasks against the share of neurons kept"))
    body = [
        *chart_section("Loss", losses),
        *chart_section("Tasks", tasks),
        *chart_section("Gates", gates),
        *map(html_table, tables(result)),
    ]
    title = f"Sparsity of {Path(result['options']['model']).name} ({result['model']['class']})"
    text = render(title, finding(result), body, shlex.join(["mone-sparsify", *sys.argv[1:]]))
    (folder / "index.html").write_text(text, encoding="utf-8")


def parts_of(result: dict[str, Any]) -> list[str]:
    """The parts of the model in which neurons were selected."""
    return list(dict.fromkeys(stream["part"] for stream in result["streams"] if stream["select"] in ("exact", "threshold")))


def finding(result: dict[str, Any]) -> str:
    """What the study found, in two sentences."""
    dense = result["streams"][0]
    sentences = [
        f"With all neurons the model loses {dense['nll_per_token']['value']:.4f} nats per token "
        f"({dense['bits_per_byte']['value']:.4f} bits per byte) on {result['text']['tokens']:,} tokens."
    ]
    for part in parts_of(result):
        its = [
            stream
            for stream in result["streams"]
            if (stream["part"], stream["select"], stream["criterion"]) == (part, "exact", "abs_gate")
        ]
        if its:
            losses = ", ".join(f"{stream['nll_above_all']['value']:+.3f} at {stream['ratio']:g}" for stream in its)
            sentences.append(f"Keeping the neurons of {PARTS[part]} with the largest |act(gate)| changes this by {losses}.")
    return " ".join([*sentences, *result.get("largest_sparsity", {}).get("sentences", [])])


def draw_losses(path: Path, result: dict[str, Any], part: str) -> None:
    """Nats per token above those with all neurons, against the share kept, a line for each way to choose neurons."""
    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        lowest = highest = 0.0
        for name, line in _series(result, part).items():
            values = [stream["nll_above_all"] for stream in line]
            middle = np.array([value["value"] for value in values])
            ends = np.array([[value["value"] if value[end] is None else value[end] for value in values]
                             for end in ("low", "high")])  # fmt: skip
            axes.errorbar(
                [stream["kept"] for stream in line], middle, yerr=np.abs(ends - middle),
                marker="o", markersize=3, linewidth=1.2, capsize=2, label=name,
            )  # fmt: skip
            if "act(gate)" in name:
                lowest, highest = min(lowest, ends.min()), max(highest, ends.max())
        axes.axhline(0, color="0.5", linewidth=1, linestyle="--")
        _share_axis(axes)
        axes.set_ylabel("nats per token above all neurons")
        # A random choice may lose so much that it would hide all other differences.
        span = max(highest - lowest, 1e-3)
        axes.set_ylim(lowest - 0.05 * span, highest + 0.2 * span)
        axes.legend()
        axes.grid(alpha=0.3)
        save(figure, path, dots=SHARPNESS)


def _series(result: dict[str, Any], part: str) -> dict[str, list[dict[str, Any]]]:
    """The streams of each way to choose neurons, by kept share."""
    names = {"exact": "K best by |act(gate)|", "threshold": "threshold on |act(gate)|"}
    series: dict[str, list[dict[str, Any]]] = {}
    for stream in result["streams"]:
        if stream["part"] == part and stream["select"] in names:
            name = names[stream["select"]] if stream["criterion"] == "abs_gate" else CONTROLS[stream["criterion"]]
            series.setdefault(name, []).append(stream)
    return {name: sorted(line, key=lambda stream: stream["kept"]) for name, line in series.items()}


def _share_axis(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.set_xlabel("share of neurons kept")


def draw_gates(path: Path, result: dict[str, Any], part: str) -> bool:
    """Share of neurons by layer (columns) and magnitude (rows, powers of two)."""
    gates = [gate for gate in result["gates"] if gate["part"] == part]
    if not gates:
        return False
    share = np.array([gate["histogram"] for gate in gates]).T
    bins = gates[0]["bins"]
    used = np.flatnonzero(share.max(1) > RAREST)
    first, last = used[0], used[-1]
    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        image = axes.imshow(
            share[first : last + 1].clip(RAREST), aspect="auto", origin="lower", interpolation="nearest",
            norm=LogNorm(RAREST, share.max()),
        )  # fmt: skip
        rows = np.unique(np.linspace(0, last - first, 7).round().astype(int))
        axes.set_yticks(rows, [f"$2^{{{round(math.log2(bins[first + row]))}}}$" for row in rows], parse_math=True)
        columns = np.unique(np.linspace(0, len(gates) - 1, 7).round().astype(int))
        axes.set_xticks(columns, [str(gates[column]["layer"]) for column in columns])
        axes.set_xlabel("layer")
        axes.set_ylabel("|act(gate)|")
        figure.colorbar(image, label="share of neurons", format=PLAIN)
        save(figure, path, dots=SHARPNESS)
    return True


def draw_thresholds(path: Path, result: dict[str, Any], part: str) -> bool:
    """The threshold of each ratio by layer."""
    lines = {ratio: by_layer for ratio, by_layer in result["thresholds"].get(part, {}).items() if float(ratio) < 1}
    return _draw_by_layer(path, lines, "threshold on |act(gate)|", log=True)


def draw_kept(path: Path, result: dict[str, Any], part: str) -> bool:
    """The share of neurons above the threshold by layer, beside the target."""
    streams = [stream for stream in result["streams"] if (stream["part"], stream["select"]) == (part, "threshold")]
    lines = {f"{stream['ratio']:g}": stream["kept_by_layer"] for stream in streams}
    return _draw_by_layer(path, lines, "share of neurons kept", log=False, targets=True)


def _draw_by_layer(path: Path, lines: dict[str, Any], label: str, *, log: bool, targets: bool = False) -> bool:
    if not lines:
        return False
    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        for number, (ratio, by_layer) in enumerate(lines.items()):
            layers = [int(layer) for layer in by_layer]
            axes.plot(layers, list(by_layer.values()), marker=".", color=f"C{number}", label=ratio)
            if targets:
                axes.axhline(float(ratio), color=f"C{number}", linewidth=0.8, linestyle=":")
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(PLAIN)
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(label)
        axes.legend(title="share kept")
        axes.grid(alpha=0.3)
        save(figure, path, dots=SHARPNESS)
    return True


def draw_tasks(path: Path, result: dict[str, Any]) -> bool:
    """Mean score of the tasks against the share of neurons kept."""
    scores = result.get("tasks", {}).get("mean", {})
    if not scores:
        return False
    dense = scores["all"]
    with plt.rc_context(LETTERS):
        figure, axes = plt.subplots(figsize=(WIDTH, HEIGHT), layout="constrained")
        for part in parts_of(result):
            for name, line in _series(result, part).items():
                known = [stream for stream in line if stream["name"] in scores]
                axes.plot([s["kept"] for s in known], [scores[s["name"]] for s in known], marker="o", markersize=3,
                          label=f"{name}, {part}")  # fmt: skip
        axes.axhline(dense, color="0.5", linewidth=1, linestyle="--", label="all neurons")
        axes.axhline(0.95 * dense, color="0.5", linewidth=1, linestyle=":", label="95 % of it")
        _share_axis(axes)
        axes.set_ylabel("mean score")
        axes.legend()
        axes.grid(alpha=0.3)
        save(figure, path, dots=SHARPNESS)
    return True


def tables(result: dict[str, Any]) -> list[Table]:
    """Streams and gates."""
    streams = [
        (
            stream["name"],
            "" if stream["kept"] is None else f"{stream['kept']:.1%}",
            interval(stream["nll_per_token"]),
            interval(stream["bits_per_byte"]),
            interval(stream["nll_above_all"], sign=True),
        )
        for stream in result["streams"]
    ]
    note = "Intervals hold 95 % of the bootstrap over documents; the last column is paired by document."
    columns = ("stream", "kept", "nats per token", "bits per byte", "nats above all neurons")
    found = [Table("Streams", note, columns, streams)]
    bounds = list(result["gates"][0]["near_zero"]) if result["gates"] else []
    for part in parts_of(result):
        thresholds = {ratio: by for ratio, by in result["thresholds"].get(part, {}).items() if float(ratio) < 1}
        rows = [
            (
                str(gate["layer"]),
                *(f"{gate['near_zero'][bound]:.1%}" for bound in bounds),
                *(f"{by_layer[gate['layer']]:.4g}" for by_layer in thresholds.values()),
            )
            for gate in result["gates"]
            if gate["part"] == part
        ]
        headings = ("layer", *(f"|act(gate)| < {bound}" for bound in bounds), *(f"keeps {ratio}" for ratio in thresholds))
        note = "Shares of neurons near zero, and the thresholds that keep a share, on the calibration text."
        found.append(Table(f"Gates of {PARTS[part]}", note, headings, rows))
    return found


def interval(value: dict[str, Any], *, sign: bool = False) -> str:
    """A number and its interval."""
    plus = "+" if sign else ""
    ends: Sequence[float | None] = (value["low"], value["high"])
    if None in ends:
        return f"{value['value']:{plus}.4f}"
    return f"{value['value']:{plus}.4f} [{value['low']:{plus}.4f}, {value['high']:{plus}.4f}]"
