"""Which training sample comes when: sources and weights of the blend, comparable as JSON, for checkpoints. Imports no torch.

    manifests = load_manifests(config)                        # ValueError for what cannot be read
    order = plan_order(config, manifests, None, 0)            # or behind a checkpoint's

Neither the world size nor the number of steps changes the order, so a run continues anywhere with the next sample.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.shards import Manifest, Shard, Split, load_manifest
from mone_common.checks import check
from train.config import RunConfig
from train.config_sections import SourceConfig

MANY_EPOCHS = 4
"""Text read so often teaches nearly as much as new text, read more often much less (arXiv 2305.16264)."""


@dataclass(frozen=True)
class Reading:
    """What a run reads of one source from its beginning to its end."""

    name: str
    share: float
    """Of the blend."""
    tokens: int
    """In its training shards."""
    read: int
    """Tokens that the run reads of it."""
    epochs: float
    """How often it is read."""


def usable_shards(manifest: Manifest, split: Split, length: int) -> list[Shard]:
    """Those that hold a sequence: sequences are packed within a shard."""
    return [shard for shard in manifest.of_split(split) if shard.tokens > length]


def load_manifests(config: RunConfig) -> list[Manifest]:
    """The manifests of all sources, their shards' sizes checked; ValueError for none, damage, or sources that do not fit."""
    blend, length = config.data.blend, config.model.seq_length
    how = "give the folders that mone-tokenize wrote, like 'data.blend=[{path: data/mine}]', or data=demo after `make data`"
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
                "tokenize all sources with one"
            )
    names = [manifest.name for manifest in manifests]
    if len(set(names)) < len(names):
        raise ValueError(f"data.blend: two sources have the same name in {names}; give corpus.name when tokenizing")
    return manifests


def plan_order(config: RunConfig, manifests: list[Manifest], saved: dict[str, Any] | None, samples: int) -> dict[str, Any]:
    """The order of samples from here on, comparable as JSON, for a checkpoint; `saved` is that of the checkpoint resumed.

    samples: read so far. An order begins at sample `start` and interleaves its sources by weight, each going on behind the
    `read` samples taken from it before; `earlier` remembers sources that left the blend. With another blend than the saved
    one a new order begins.

    Raises ValueError if the seed of the order changed, or a source has the name of another one with other content.
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
    """What a resume changes about the data, or None."""
    if saved is None or order == saved:
        return None
    parts = [f"{source['name']} from its sample {source['read']}" for source in order["sources"]]
    return f"data.blend changed: from sample {order['start']} on, {', '.join(parts)}"


def describe_reading(reading: list[Reading]) -> str:
    """A line for each source, and a warning for those that are read many times."""
    width = max(len(source.name) for source in reading)
    lines = [
        f"{'' if number else 'data':<9} {source.name:<{width}} {source.share:6.1%} of the blend: "
        f"{source.read / 1e6:.2f}M of {source.tokens / 1e6:.2f}M tokens, {source.epochs:.2f} epochs"
        for number, source in enumerate(reading)
    ]
    if many := [f"{source.name} {source.epochs:.1f} times" for source in reading if source.epochs > MANY_EPOCHS]:
        lines.append(
            f"warning: this run reads {', '.join(many)}. Beyond {MANY_EPOCHS} epochs, text that is read again teaches much "
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
    """Of each sample its source and its number in that source, two arrays [samples], by Megatron-Core's greedy rule."""
    from mone_model import megatron

    megatron.prepare()  # commands that only plan a run have not called it
    from megatron.core.datasets import helpers

    # Megatron-Core's helper wants int16 places for the source of each sample.
    source_of, index_in = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(source_of, index_in, weights, len(weights), samples, False)
    return source_of, index_in


def _content(shards: list[Shard]) -> str:
    return hashlib.sha256("".join(shard.bin_sha256 for shard in shards).encode()).hexdigest()
