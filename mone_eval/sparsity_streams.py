"""Streams of a sparsification study: what each keeps, and how its rule is found for a layer.

    streams = streams_of(parts=["routed"], ratios=[0.5], select=["exact"], controls=["random"], trained=False)
    with calibrating(experts, streams) as layer:             # the experts of one layer, and a pass of calibration text
        ...
    rule = layer.rule(streams[1], experts[0], None)          # Rule(k=...)

A stream is a model: the hidden states of the scored text, of which each layer keeps what the stream's rule keeps. Shapes: E
experts, H neurons, M magnitudes.
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mone_eval.expert_hooks import CRITERIA, HookedExperts, Rows, Rule
from mone_model.config import top_k
from mone_model.neuron_selection import select_neurons
from mone_model.thresholds import count_magnitudes, find_thresholds

PAPER = "abs_gate"
"""The criterion of arXiv 2510.05781."""
CONTROLS = (*(name for name in CRITERIA if name != PAPER), "static")
"""Other ways to choose as many neurons: `static` keeps the neurons of an expert that calibration text uses most."""


class Stream(NamedTuple):
    """One column of the study."""

    select: str
    """all neurons; as trained, for models that select; the exact K best; or by threshold."""
    part: str = ""
    """Which neurons are selected: those of routed, shared or dense experts."""
    criterion: str = PAPER
    ratio: float = 1.0
    """Share of the neurons of an expert to keep."""

    @property
    def name(self) -> str:
        """Identifies the stream in results."""
        if self.select in ("all", "trained"):
            return self.select
        return f"{self.part} {self.criterion} {self.select} {self.ratio:g}"


def streams_of(
    *, parts: Sequence[str], ratios: Sequence[float], select: Sequence[str], controls: Sequence[str], trained: bool
) -> list[Stream]:
    """All streams; the first keeps all neurons. Controls are selected exactly, at the same ratios."""
    streams = [Stream("all"), *([Stream("trained", "routed")] if trained else [])]
    for part in parts:
        for ratio in ratios:
            if ratio < 1:
                streams += [Stream(how, part, PAPER, ratio) for how in select]
                streams += [Stream("exact", part, control, ratio) for control in controls]
    return streams


@dataclass
class LayerCalibration:
    """What the calibration text says about the experts of one layer."""

    counts: dict[str, torch.Tensor] = field(default_factory=dict)
    """For each part, [M] how often |act(gate)| has each magnitude (`mone_model.thresholds`)."""
    used: dict[tuple[str, float], torch.Tensor] = field(default_factory=dict)
    """For a module and a ratio, [E, H] how often a neuron is among the K best."""

    def threshold(self, part: str, ratio: float) -> float:
        """The threshold that this share of the neurons of a part reaches."""
        return find_thresholds(self.counts[part][None], ratio=ratio)[0]

    def rule(self, stream: Stream, experts: HookedExperts, threshold: float | None) -> Rule | None:
        """What a stream keeps of these experts; threshold: for streams that select by threshold."""
        if stream.select == "trained":
            return experts.trained
        if stream.select == "all" or stream.part != experts.part:
            return None
        if stream.select == "threshold":
            return Rule(threshold=threshold)
        k = top_k(stream.ratio, experts.neurons)
        if stream.criterion == "static":
            used_EH = self.used[experts.name, stream.ratio]
            return Rule(static_EH=select_neurons(used_EH.float(), k).mask_NH)
        return Rule(stream.criterion, k=k)


@contextlib.contextmanager
def calibrating(experts: Sequence[HookedExperts], streams: Sequence[Stream]) -> Iterator[LayerCalibration]:
    """Watch the experts of a layer inside the block, which passes the calibration text through it with all neurons."""
    layer = LayerCalibration()
    static: dict[str, set[float]] = defaultdict(set)
    for stream in streams:
        if stream.criterion == "static":
            static[stream.part].add(stream.ratio)
    for one in experts:
        one.reset(None)
        one.observe = functools.partial(_observe, layer, one, sorted(static[one.part]))
    try:
        yield layer
    finally:
        for one in experts:
            one.observe = None


def _observe(layer: LayerCalibration, experts: HookedExperts, ratios: Sequence[float], rows: Rows) -> None:
    counts_M = count_magnitudes(rows.active_NH).cpu()
    before = layer.counts.get(experts.part)
    layer.counts[experts.part] = counts_M if before is None else before + counts_M
    for ratio in ratios:
        used_EH = layer.used.setdefault((experts.name, ratio), torch.zeros(experts.experts, experts.neurons))
        kept_NH = select_neurons(rows.active_NH, top_k(ratio, experts.neurons)).mask_NH.float().cpu()
        if rows.expert_N is None:
            used_EH += kept_NH.sum(0)
        else:
            used_EH.index_add_(0, rows.expert_N.cpu(), kept_NH)
