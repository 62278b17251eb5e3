"""The order of training samples: sources and weights of the blend, in JSON types for checkpoints. Imports no torch.

    manifests = load_manifests(config)                        # ValueError for missing or damaged data
    order = plan_order(config, manifests, None, 0)            # or after that of a checkpoint

The order does not depend on the world size or the number of steps. A run can therefore continue in any layout.
"""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.shards import Manifest, Shard, Split, load_manifest
from mone_common.checks import check
from train.config import RunConfig
from train.config_sections import SourceConfig

SCORED: tuple[Split, ...] = ("validation", "train")
"""Splits of evaluation.text, the preferred one first."""
MANY_EPOCHS = 4
"""Up to this many epochs, repeated text adds nearly as much as new text; beyond, much less (arXiv 2305.16264)."""


@dataclass(frozen=True)
class Reading:
    """Tokens and epochs of one source over a whole run."""

    name: str
    share: float
    """Share of the blend."""
    tokens: int
    """Tokens in its training shards."""
    read: int
    """Tokens that the run reads from it."""
    epochs: float
    """Number of epochs."""


def usable_shards(manifest: Manifest, split: Split, length: int) -> list[Shard]:
    """The shards that hold at least one sequence; sequences do not cross shards."""
    return [shard for shard in manifest.of_split(split) if shard.tokens > length]


def load_manifests(config: RunConfig) -> list[Manifest]:
    """The manifests of all sources; ValueError if there is no source, a shard has a wrong size, or sources do not match."""
    blend, length = config.data.blend, config.model.seq_length
    how = "give output folders of mone-tokenize, like 'data.blend=[{path: data/mine}]', or data=demo after `make data`"
    check(bool(blend), "data.blend", blend, f"there is no data to read: {how}")
    manifests = [load_manifest(source.path) for source in blend]
    first = manifests[0]
    for source, manifest in zip(blend, manifests, strict=True):
        manifest.check_sizes()
        if not usable_shards(manifest, "train", length):
            raise ValueError(f"data.blend: no shard of {source.path} holds a sequence of model.seq_length={length} tokens")
        if manifest.tokenizer_sha256 != first.tokenizer_sha256:
            raise ValueError(
                f"data.blend: {source.path} was tokenized with another tokenizer than {blend[0].path}; "
                "tokenize all sources with the same tokenizer"
            )
    names = [manifest.name for manifest in manifests]
    if len(set(names)) < len(names):
        raise ValueError(f"data.blend: two sources have the same name in {names}; give corpus.name when tokenizing")
    return manifests


def load_evaluated(config: RunConfig, blend: list[Manifest]) -> list[tuple[Manifest, Split]]:
    """The manifests of evaluation.text, and the split of each that is scored.

    blend: the manifests of data.blend. ValueError if data are missing or damaged, or do not match.
    """
    found: list[tuple[Manifest, Split]] = []
    trained = {os.path.realpath(manifest.folder) for manifest in blend}
    for path in config.evaluation.text:
        manifest = load_manifest(path)
        manifest.check_sizes()
        if os.path.realpath(path) in trained:
            raise ValueError(
                f"evaluation.text: {path} is in data.blend, so its validation loss is recorded without this option"
            )
        if manifest.tokenizer_sha256 != blend[0].tokenizer_sha256:
            raise ValueError(
                f"evaluation.text: {path} was tokenized with another tokenizer than {blend[0].folder}; tokenize it with that"
            )
        split = next((each for each in SCORED if usable_shards(manifest, each, config.model.seq_length)), None)
        if split is None:
            raise ValueError(f"evaluation.text: no shard of {path} has model.seq_length={config.model.seq_length} tokens")
        found.append((manifest, split))
    names = [manifest.name for manifest, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"evaluation.text: two folders have the same name in {names}; give corpus.name when tokenizing")
    return found


def plan_order(config: RunConfig, manifests: list[Manifest], saved: dict[str, Any] | None, samples: int) -> dict[str, Any]:
    """The order of samples from here on, in JSON types for a checkpoint.

    saved: the order of the checkpoint resumed from, or None. samples: number of samples read so far. An order begins at
    sample `start` and interleaves its sources by weight. Each source continues after the `read` samples taken from it
    before. `earlier` lists sources that are no longer in the blend. If the blend differs from the saved one, a new order
    begins.

    Raises ValueError if the seed of the order changed, or the content of a source changed.
    """
    seed = config.data_seed
    sources = [
        {"name": manifest.name, "weight": _weight(source, manifest), "content": _content(manifest.of_split("train"))}
        | {"read": 0}
        for source, manifest in zip(config.data.blend, manifests, strict=True)
    ]
    if saved is None:
        return {"seed": seed, "start": 0, "sources": sources, "earlier": []}
    if saved["seed"] != seed:
        option = "run.seed" if config.data.seed is None else "data.seed"
        raise ValueError(f"{option}={seed} (saved: {saved['seed']}): it decides the order of samples")
    if [_without_read(source) for source in sources] == [_without_read(source) for source in saved["sources"]]:
        return saved
    weights = weights_of(saved["sources"])
    counts = np.bincount(interleave(weights, samples - saved["start"])[0], minlength=len(weights)).tolist()
    known = {source["name"]: source for source in saved["earlier"]}
    for source, count in zip(saved["sources"], counts, strict=True):
        known[source["name"]] = source | {"read": source["read"] + count}
    for source in sources:
        before = known.pop(source["name"], source)
        if before["content"] != source["content"]:
            raise ValueError(
                f"data.blend: source {source['name']} has other content than in the checkpoint; restore it, or give the new "
                "corpus another corpus.name"
            )
        source["read"] = before["read"]
    return {"seed": seed, "start": samples, "sources": sources, "earlier": list(known.values())}


def describe_order(order: dict[str, Any], saved: dict[str, Any] | None) -> str | None:
    """The change of the data at a resume, or None."""
    if saved is None or order == saved:
        return None
    parts = [f"{source['name']} from its sample {source['read']}" for source in order["sources"]]
    return f"data.blend changed: from sample {order['start']} on, {', '.join(parts)}"


def describe_reading(reading: list[Reading]) -> str:
    """One line for each source, and a warning for sources with many epochs."""
    width = max(len(source.name) for source in reading)
    lines = [
        f"{'' if number else 'data':<9} {source.name:<{width}} {source.share:6.1%} of the blend: "
        f"{source.read / 1e6:.2f}M of {source.tokens / 1e6:.2f}M tokens, {source.epochs:.2f} epochs"
        for number, source in enumerate(reading)
    ]
    if many := [f"{source.name} {source.epochs:.1f} times" for source in reading if source.epochs > MANY_EPOCHS]:
        lines.append(
            f"warning: this run reads {', '.join(many)}. Beyond {MANY_EPOCHS} epochs, repeated text adds much "
            "less than new text: give more text, less weight, or fewer steps"
        )
    return "\n".join(lines)


def _weight(source: SourceConfig, manifest: Manifest) -> float:
    return float(source.weight if source.weight is not None else manifest.tokens("train"))


def _without_read(source: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in source.items() if name != "read"}


def weights_of(sources: list[dict[str, Any]]) -> np.ndarray:
    """The weights [number of sources] of the sources of an order; their sum is 1."""
    weights = np.array([source["weight"] for source in sources], dtype=np.float64)
    return weights / weights.sum()


def interleave(weights: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each sample and its index in the source, two arrays [samples], by Megatron-Core's greedy rule."""
    from mone_model import megatron

    megatron.prepare()  # commands that only plan a run have not called it
    from megatron.core.datasets import helpers

    # Megatron-Core's helper requires int16 for the sources.
    source_of, index_in = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(source_of, index_in, weights, len(weights), samples, False)
    return source_of, index_in


def _content(shards: list[Shard]) -> str:
    return hashlib.sha256("".join(shard.bin_sha256 for shard in shards).encode()).hexdigest()
