"""Tests the differences between points and their baselines.

for found in assess(points, compare(points), margin=0.03):
found.name, found.base, found.test.mean, found.test.low, found.p_holm, found.over_documents, found.tokens_saved
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from launch.baselines import Comparison
from launch.points import Point
from launch.results import labels
from launch.statistics import Contrast, bootstrap, contrast, holm, saved_tokens, slope


@dataclass(frozen=True)
class Assessment:
    """A point, its baseline, and the tests of the differences between runs with the same seed."""

    name: str
    """Label of the point."""
    base: str
    """Label of the baseline."""
    test: Contrast
    p_holm: float
    """The p value of the test, corrected for several contrasts; nan for a contrast that is not among them."""
    over_documents: tuple[float, float] | None
    """95 % interval over seeds and documents (`bootstrap_points`)."""
    tokens_saved: float
    """What the difference is worth in tokens of the baseline (`launch.statistics.saved_tokens`)."""


def assess(points: Sequence[Point], compared: Sequence[Comparison | None], *, margin: float) -> list[Assessment]:
    """The contrasts with at least two pairs of runs, in order; Holm's correction is for all of them."""
    names = dict(zip(map(id, points), labels(points), strict=True))
    pairs = [
        (point, found.base, contrast(found.difference.values, margin=margin))
        for point, found in zip(points, compared, strict=True)
        if found is not None and found.paired and len(found.difference.values) > 1
    ]
    corrected = holm([test.p for _, _, test in pairs])
    return [
        assessment(names[id(point)], names[id(base)], point, base, test, p_holm=p)
        for (point, base, test), p in zip(pairs, corrected, strict=True)
    ]


def assessment(name: str, base_name: str, point: Point, base: Point, test: Contrast, *, p_holm: float) -> Assessment:
    """A tested contrast with its interval over documents and its worth in tokens."""
    # The curve of a branch is too short for a slope.
    saved = math.nan if base.options.get("init.branch") else saved_tokens(test.mean, curve_slope(base))
    return Assessment(name, base_name, test, p_holm, bootstrap_points(point, base), saved)


def bootstrap_points(point: Point, base: Point) -> tuple[float, float] | None:
    """Interval of the difference over seeds and documents; None for fewer than three pairs with losses of documents."""
    theirs = {run.seeds: run.documents for run in base.complete}
    pairs = [(run.documents, theirs.get(run.seeds)) for run in point.complete]
    found = [(ours, their) for ours, their in pairs if ours is not None and their is not None]
    if len(found) < 3:  # of two seeds there are three resamples
        return None
    ours_SN, theirs_SN = (np.array([pair[side].nll for pair in found]) for side in (0, 1))
    return bootstrap(ours_SN, theirs_SN, np.array(found[0][0].tokens))


def curve_slope(point: Point) -> float:
    """Mean over the runs of the slope of the training loss; nan without a curve."""
    curves = [run.series("train/loss", "train/tokens") for run in point.counted]
    slopes = [slope(*zip(*curve, strict=True)) for curve in curves if len(curve) > 3]
    return statistics.fmean(slopes) if slopes else math.nan
