"""Passes text through a model layer by layer, once for each stream of a study, with every layer loaded once.

    study = Study(model, hook_experts(model.model), streams, [scored], calibration)
    study.calibrate_model()                              # with per="model" only
    while not study.done:
        study.advance()                                  # one layer
        torch.save(study.state(), path)                  # `study.restore` continues from it
    (losses,) = study.score(0)                           # of the first stream, for each text

Shapes: B sequences, T tokens, D width, V vocabulary, W windows, M magnitudes.
"""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from mone_eval.documents import Document
from mone_eval.expert_hooks import HookedExperts, by_layer
from mone_eval.layerwise import Batch, LayerwiseModel
from mone_eval.sparsity_streams import LayerCalibration, Stream, calibrating
from mone_eval.windows import IGNORED, Window, collate
from mone_model.thresholds import find_thresholds

ALL = 0
"""Number of the stream that keeps all neurons."""
LOGITS = 2**24
"""Largest number of logits in memory."""


@dataclass
class Text:
    """Windows of documents, in batches of equal length, so that no padding enters the counts."""

    documents: Sequence[Document]
    windows: list[Window]
    begin: int | None
    """Beginning-of-document token."""
    batches: list[list[Window]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Stable, so that the order does not depend on the size of a batch.
        self.windows = sorted(self.windows, key=len, reverse=True)

    def split(self, tokens: int) -> "Text":
        """Set the batches: at most this many tokens each, or one window."""
        self.batches = []
        for length, group in itertools.groupby(self.windows, key=len):
            rows, same = max(1, tokens // length), list(group)
            self.batches += [same[first : first + rows] for first in range(0, len(same), rows)]
        return self

    @property
    def in_batches(self) -> list[Window]:
        """The windows in the order of the losses."""
        return [window for batch in self.batches for window in batch]

    @property
    def tokens(self) -> int:
        """Number of tokens that the model reads."""
        return sum(map(len, self.windows))


@dataclass
class Losses:
    """How a stream predicts the windows, in the order of `Text.in_batches`."""

    nll_W: torch.Tensor
    """Summed negative log-likelihood of the scored tokens, nats, float64."""
    greedy_W: torch.Tensor
    """Whether every scored token is the most probable one."""


class Study:
    """The hidden states of all streams after some layers."""

    def __init__(
        self,
        model: LayerwiseModel,
        hooked: Sequence[HookedExperts],
        streams: Sequence[Stream],
        texts: Sequence[Text],
        calibration: Text,
        *,
        per: str = "layer",
        thresholds_from: str = "stream",
        seed: int = 0,
    ) -> None:
        """Passes the embeddings of all texts.

        texts: to score. per: layer, or model for one threshold in all layers. thresholds_from: whose hidden states set the
        thresholds of a layer: those of the stream itself, or of the model with all neurons (all).
        """
        self.model, self.streams, self.per, self.seed = model, streams, per, seed
        self.texts, self.calibration = texts, calibration
        self.experts = by_layer(hooked, model.layer_names)
        """The experts of each layer."""
        self.batches = [self._begin(text, batch) for text in texts for batch in text.batches]
        self.calibration_batches = [self._begin(calibration, batch) for batch in calibration.batches]
        self.layers_done = 0
        first = [batch.hidden_BTD for batch in self.batches]
        self.hidden = [list(first) for _ in streams]
        """For each stream and batch."""
        own = range(len(streams)) if per == "layer" and thresholds_from == "stream" else ()
        self.calibration_hidden = {
            index: [batch.hidden_BTD for batch in self.calibration_batches]
            for index in (ALL, *(index for index in own if streams[index].select == "threshold"))
        }
        """By stream and batch: of the model with all neurons, and of the streams whose thresholds come from their own."""
        self.thresholds: dict[tuple[int, int], float] = {}
        """By stream and layer."""
        self.kept: dict[tuple[int, int, str], tuple[int, int]] = {}
        """By stream, layer and part: neurons kept and neurons computed, summed over rows."""
        self.counts: dict[tuple[int, str], torch.Tensor] = {}
        """By layer and part, [M]: how often |act(gate)| has each magnitude on the calibration text."""
        self.model_thresholds: dict[tuple[str, float], float] | None = None
        """One threshold for all layers, by part and ratio; None: each layer has its own."""

    def _begin(self, text: Text, batch: list[Window]) -> Batch:
        return self.model.begin(collate(batch, text.documents, begin=text.begin)[0])

    @property
    def done(self) -> bool:
        """Whether all layers are done."""
        return self.layers_done == len(self.model.layers)

    def advance(self) -> None:
        """Pass the calibration text and then every stream through the next layer."""
        number = self.layers_done
        with self.model.layer(number):
            found = self._calibrate(number)
            for index in range(len(self.streams)):
                self._set_rules(found, number, index)
                hidden = self.hidden[index]
                for place, batch in enumerate(self.batches):  # in place, so that no stream is in memory twice
                    hidden[place] = self.model.run(number, batch, hidden[place])
                for one in self.experts[number]:
                    kept, seen = self.kept.get((index, number, one.part), (0, 0))
                    self.kept[index, number, one.part] = kept + one.kept, seen + one.seen
        self.layers_done += 1

    def _calibrate(self, number: int) -> LayerCalibration:
        """Pass the calibration text through a layer with all neurons."""
        with calibrating(self.experts[number], self.streams) as found:
            self._pass_calibration(number, ALL)
        self.counts |= {(number, part): counts_M for part, counts_M in found.counts.items()}
        return found

    def _pass_calibration(self, number: int, index: int, *, keep: bool = True) -> None:
        hidden = self.calibration_hidden[index]
        for place, batch in enumerate(self.calibration_batches):
            out_BTD = self.model.run(number, batch, hidden[place])
            if keep:
                hidden[place] = out_BTD

    def _set_rules(self, found: LayerCalibration, number: int, index: int) -> None:
        stream = self.streams[index]
        present = any(one.part == stream.part for one in self.experts[number])
        threshold = None
        if stream.select == "threshold" and present:
            threshold = self.thresholds[index, number] = self._find_threshold(found, number, index)
        if index in self.calibration_hidden and index != ALL:
            self._apply(found, stream, threshold)
            self._pass_calibration(number, index)
        # A control may be random: the draws must not depend on where a study was continued.
        torch.manual_seed(zlib.crc32(f"{self.seed} {number} {stream.name}".encode()))
        self._apply(found, stream, threshold)

    def _apply(self, found: LayerCalibration, stream: Stream, threshold: float | None) -> None:
        for one in self.experts[self.layers_done]:
            one.reset(found.rule(stream, one, threshold))

    def _find_threshold(self, found: LayerCalibration, number: int, index: int) -> float:
        stream = self.streams[index]
        if self.model_thresholds is not None:
            return self.model_thresholds[stream.part, stream.ratio]
        if index in self.calibration_hidden:
            # The gates of a layer do not depend on which of its neurons are kept.
            with calibrating(self.experts[number], ()) as found:
                self._pass_calibration(number, index, keep=False)
        return found.threshold(stream.part, stream.ratio)

    def calibrate_model(self) -> None:
        """If `per` is model, find the thresholds: a pass of the calibration text, which reads every layer once more."""
        if self.per == "layer" or self.model_thresholds is not None:
            return
        for number in range(len(self.model.layers)):
            with self.model.layer(number):
                self._calibrate(number)
        self.calibration_hidden[ALL] = [batch.hidden_BTD for batch in self.calibration_batches]
        self.model_thresholds = {
            (stream.part, stream.ratio): find_thresholds(self._all_counts(stream.part), ratio=stream.ratio, per="model")[0]
            for stream in self.streams
            if stream.select == "threshold"
        }

    def _all_counts(self, part: str) -> torch.Tensor:
        """[L, M] counts of the layers that have experts of a part."""
        return torch.stack([counts_M for (_, of), counts_M in sorted(self.counts.items()) if of == part])

    def score(self, index: int) -> list[Losses]:
        """The losses of a stream after the last layer, for each text."""
        hidden = zip(self.batches, self.hidden[index], strict=True)
        found = []
        for text in self.texts:
            losses = [self._score(text, windows, *next(hidden)) for windows in text.batches]
            found.append(Losses(*map(torch.cat, zip(*losses, strict=True))))
        return found

    def _score(
        self, text: Text, windows: list[Window], batch: Batch, hidden_BTD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        targets_BT = collate(windows, text.documents, begin=text.begin)[1]
        step = max(1, LOGITS // (len(windows) * self.model.model.config.get_text_config().vocab_size))
        nll_B = torch.zeros(len(windows), dtype=torch.float64)
        greedy_B = torch.ones(len(windows), dtype=torch.bool)
        # Logits before the first scored token of the batch are not needed.
        first = int((targets_BT != IGNORED).any(0).int().argmax())
        for start in range(first, targets_BT.size(1), step):
            logits_BtV = self.model.logits(batch, hidden_BTD, start=start, stop=start + step)
            part_Bt = targets_BT[:, start : start + step].to(logits_BtV.device)
            loss_N = cross_entropy(
                logits_BtV.flatten(0, 1).float(), part_Bt.flatten(), ignore_index=IGNORED, reduction="none"
            )
            nll_B += loss_N.view_as(part_Bt).double().sum(1).cpu()
            greedy_B &= ((logits_BtV.argmax(-1) == part_Bt) | (part_Bt == IGNORED)).all(1).cpu()
        return nll_B, greedy_B

    def share_kept(self, index: int, part: str) -> dict[int, float]:
        """The share of neurons that a stream kept, for each layer that has experts of a part."""
        found = {layer: counts for (of, layer, kind), counts in sorted(self.kept.items()) if (of, kind) == (index, part)}
        return {layer: kept / seen for layer, (kept, seen) in found.items() if seen}

    def mean_kept(self, index: int, part: str) -> float | None:
        """The share of neurons that a stream kept in all layers that have experts of a part; None without a part."""
        found = [counts for (of, _, kind), counts in self.kept.items() if (of, kind) == (index, part)]
        return sum(kept for kept, _ in found) / sum(seen for _, seen in found) if found else None

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue."""
        names = ("layers_done", "hidden", "calibration_hidden", "thresholds", "kept", "counts", "model_thresholds")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        for name, value in state.items():
            setattr(self, name, value)
