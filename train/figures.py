"""Figures of a run, as PNG files in its folder: loss curve, expert load, neuron use."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from mone_common.figures import plt, save

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mone_model.neuron_stats import NeuronUsage


def draw_losses(path: Path, records: list[dict[str, Any]], unigram_entropy: float | None = None) -> None:
    """Training and validation loss over steps, with the unigram entropy of the corpus as a baseline."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    train = [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
    if train:
        axes.plot(*zip(*train, strict=True), color="black", linewidth=1, label="training")
    names = sorted({name for record in records for name in record if name.startswith("validation/loss/")})
    for name in names:
        points = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(
            *zip(*points, strict=True), marker="o", markersize=3, label=name.replace("validation/loss/", "validation: ")
        )
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="grey", linestyle="--", label="unigram entropy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def draw_expert_load(path: Path, usage: "NeuronUsage", step: int) -> None:
    """Load of each expert in each layer, relative to uniform load."""
    share_LE = usage.tokens_LE / usage.tokens_LE.mean(-1, keepdim=True).clamp_min(1e-12)
    layers, experts = share_LE.shape
    figure, axes = plt.subplots(figsize=(1.5 + max(4.0, 0.35 * experts), 1.4 + 0.35 * layers), layout="constrained")
    image = axes.imshow(share_LE, aspect="auto", cmap="coolwarm", vmin=0, vmax=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(layers))
    axes.set_title(f"expert load relative to an even share, step {step}", fontsize=10)
    figure.colorbar(image)
    save(figure, path)


def draw_neuron_use(path: Path, usage: "NeuronUsage", k_L: "Sequence[int]", step: int) -> None:
    """Share of tokens for which each neuron is kept: one panel per layer, one row per expert, neurons sorted by use.

    k_L: neurons that a token keeps in each layer.
    """
    tokens_LE1 = usage.tokens_LE[..., None].clamp_min(1)
    kept_LEH = (usage.selected_LEH / tokens_LE1).sort(dim=-1, descending=True).values.numpy()
    layers, experts, neurons = kept_LEH.shape
    columns = min(4, layers)
    rows = -(-layers // columns)
    figure, panels = plt.subplots(
        rows,
        columns,
        figsize=(3 * columns + 1, 0.9 + (0.6 + 0.12 * experts) * rows),
        squeeze=False,
        layout="constrained",
    )
    image = None
    for layer, axes in enumerate(panels.flat):
        if layer >= layers:
            axes.axis("off")
            continue
        image = axes.imshow(kept_LEH[layer], aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.axvline(k_L[layer] - 0.5, color="white", linewidth=0.8, linestyle=":")
        axes.set_title(f"layer {layer}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.set_yticks(np.arange(experts) if experts <= 8 else [])
        axes.tick_params(labelsize=7)
    kept = f"K = {k_L[0]}" if len(set(k_L)) == 1 else "K"
    figure.supxlabel(f"neurons of an expert, most used first (dotted: {kept} of {neurons})", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.suptitle(f"share of its expert's tokens that keep a neuron, step {step}", fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.8)
    save(figure, path)
