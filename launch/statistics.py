"""Statistics of paired differences: intervals, tests of difference and equivalence, bootstrap over seeds and documents.

    found = contrast(differences_S, margin=0.03)
    found.mean, found.low, found.high                 # 95 % interval over seeds, Student's t
    found.p, found.p_equivalent                       # two-sided t test; two one-sided tests (TOST)
    holm([each.p for each in contrasts])              # p values corrected for several tests
    bootstrap(nll_SN, other_nll_SN, tokens_N)         # interval over seeds and documents

Legend: S pairs of runs with the same seed, N documents, R resamples. Losses in nats per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 10_000
DRAWN_TOGETHER = 20_000_000
"""Largest number of document counts in memory."""


@dataclass(frozen=True)
class Contrast:
    """The mean of paired differences and how certain it is; nan where there are too few pairs."""

    mean: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    p: float
    """Two-sided p value of a difference of 0."""
    p_equivalent: float
    """Larger p value of the two one-sided tests that the difference is not within the margin."""
    p_above: float
    """One-sided p value of a difference that is not above the margin."""
    margin: float
    pairs: int

    @property
    def equivalent(self) -> bool:
        """Whether the difference is within the margin at a level of 5 %."""
        return self.p_equivalent < 1 - LEVEL


def contrast(differences_S: Sequence[float], *, margin: float) -> Contrast:
    """Student's t over the pairs, and TOST (Schuirmann 1987): the difference is above -margin and below margin."""
    values = np.asarray(differences_S, np.float64)
    mean = float(values.mean()) if len(values) else math.nan
    if len(values) < 2:
        return Contrast(mean, math.nan, math.nan, math.nan, math.nan, math.nan, margin, len(values))
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:  # scipy would divide by it
        outside, not_above = float(abs(mean) >= margin), float(mean <= margin)
        return Contrast(mean, mean, mean, float(mean == 0), outside, not_above, margin, len(values))
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(LEVEL)
    above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(values, margin, alternative="less").pvalue
    p, p_equivalent = float(test.pvalue), float(max(above, below))
    return Contrast(mean, float(low), float(high), p, p_equivalent, float(1 - below), margin, len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values, corrected for the number of tests (Holm 1979); nan stays nan and is no test."""
    order = sorted((number for number, p in enumerate(p_values) if not math.isnan(p)), key=lambda number: p_values[number])
    corrected, largest = list(p_values), 0.0
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def bootstrap(
    nll_SN: np.ndarray, other_nll_SN: np.ndarray, tokens_N: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of nll - other_nll per token (percentile bootstrap): seeds and documents are drawn with replacement.

    Each resample draws pairs of runs, and independently of them documents, which are the same for all runs. The bootstrap of
    few seeds is too narrow, so their deviations from the mean are scaled by sqrt(S / (S - 1)) t(S - 1) / z: with equal
    documents the interval is about that of Student's t.
    """
    difference_SN = np.asarray(nll_SN, np.float64) - np.asarray(other_nll_SN, np.float64)
    if (count := len(difference_SN)) > 1:
        quantile = (1 + LEVEL) / 2
        scale = math.sqrt(count / (count - 1)) * stats.t.ppf(quantile, count - 1) / stats.norm.ppf(quantile)
        mean_N = difference_SN.mean(0)
        difference_SN = mean_N + scale * (difference_SN - mean_N)
    tokens_N = np.asarray(tokens_N, np.float64)
    pairs, documents = difference_SN.shape
    random = np.random.default_rng(seed)
    means = []
    for first in range(0, resamples, max(1, DRAWN_TOGETHER // documents)):
        rows = min(max(1, DRAWN_TOGETHER // documents), resamples - first)
        seeds_RS = random.multinomial(pairs, np.full(pairs, 1 / pairs), size=rows) / pairs
        drawn_RN = random.multinomial(documents, np.full(documents, 1 / documents), size=rows)
        means.append(((seeds_RS @ difference_SN) * drawn_RN).sum(1) / np.maximum(drawn_RN @ tokens_N, 1))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def slope(tokens: Sequence[float], losses: Sequence[float]) -> float:
    """Fall of the loss for each natural logarithm of tokens, over the second half of a loss curve (least squares)."""
    half = len(tokens) // 2
    if len(tokens) - half < 2:
        return math.nan
    return -float(np.polyfit(np.log(tokens[half:]), losses[half:], 1)[0])


def saved_tokens(difference: float, slope: float) -> float:
    """Share of training tokens that a difference is worth: the baseline would need 1 / (1 - share) times as many to match.

    Negative for a higher loss; nan if the curve does not fall, or the baseline has this loss after a tenth of its tokens.
    difference: in nats per token; negative is better. slope: of the baseline's curve.
    """
    return 1 - math.exp(difference / slope) if slope > 0 and difference / slope < math.log(10) else math.nan
