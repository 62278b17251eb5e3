"""Scores of text with bootstrap intervals over documents.

    score = score_text(nll_N, tokens_N, bytes_N)
    score.bits_per_byte.value, score.bits_per_byte.low, score.bits_per_byte.high
    paired_difference(nll_N, other_nll_N, bytes_N)          # of two models on the same documents

Legend: N documents, R resamples.

A score is a ratio of sums over documents: nats per token, or bits per byte. Documents are drawn with replacement, and the
interval holds the middle 95 % of the ratios (percentile bootstrap, Efron and Tibshirani 1993, chapter 13). The draws depend
on the seed and on the number of documents alone, so two models are compared on the same draws.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
DRAWN_TOGETHER = 10_000_000
"""Largest number of document counts in memory."""


@dataclass(frozen=True)
class Interval:
    """A number with its interval."""

    value: float
    low: float | None
    """Lower end; None with fewer than two documents."""
    high: float | None
    """Upper end."""

    def map(self, function: Any) -> "Interval":
        """The interval of an increasing function of the number."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Interval(function(self.value), low, high)

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f}{ends}"


@dataclass(frozen=True)
class TextScore:
    """Scores of one model on one text."""

    nll_per_token: Interval
    """Mean negative log-likelihood, nats per token."""
    perplexity: Interval
    """exp of `nll_per_token`."""
    bits_per_byte: Interval
    """Negative log-likelihood in bits, divided by the bytes of the text; comparable between tokenizers."""


def score_text(nll_N: Any, tokens_N: Any, bytes_N: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> TextScore:
    """The scores of documents.

    nll_N: summed negative log-likelihood of each document, nats. tokens_N: scored tokens. bytes_N: bytes of text.
    """
    nll_per_token = ratio_interval(nll_N, tokens_N, resamples=resamples, seed=seed)
    bits_per_byte = ratio_interval(np.asarray(nll_N) / math.log(2), bytes_N, resamples=resamples, seed=seed)
    return TextScore(nll_per_token, nll_per_token.map(_exp), bits_per_byte)


def paired_difference(nll_N: Any, other_nll_N: Any, size_N: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """How much more the other model loses on the same documents, per unit of size; negative if the other is better.

    size_N: tokens or bytes of each document.
    """
    difference_N = np.asarray(other_nll_N, np.float64) - np.asarray(nll_N, np.float64)
    return ratio_interval(difference_N, size_N, resamples=resamples, seed=seed)


def ratio_interval(sums_N: Any, sizes_N: Any, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """sum(sums_N) / sum(sizes_N) with its bootstrap interval over documents."""
    pairs_N2 = np.stack([np.asarray(sums_N, np.float64), np.asarray(sizes_N, np.float64)], axis=1)
    total, size = pairs_N2.sum(axis=0)
    documents = len(pairs_N2)
    if documents < 2:
        return Interval(float(total / size), None, None)
    random = np.random.default_rng(seed)
    together = max(1, DRAWN_TOGETHER // documents)
    ratios = []
    for first in range(0, resamples, together):
        rows = min(together, resamples - first)
        drawn_RN = random.multinomial(documents, np.full(documents, 1 / documents), size=rows)
        sums_R2 = drawn_RN @ pairs_N2
        # A draw may hold only documents without a scored token.
        sums_R2 = sums_R2[sums_R2[:, 1] > 0]
        ratios.append(sums_R2[:, 0] / sums_R2[:, 1])
    low, high = np.quantile(np.concatenate(ratios), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(total / size), float(low), float(high))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
