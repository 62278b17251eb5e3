"""Finds the baseline of each point: by default the plain MoE with the same options, in any of the folders.

compared = compare(points)                                     # baseline: activation_ratio=1
compared = compare(points, wanted={"model.neuron_balance_coeff": 0})
compared = compare(points, named=points[0])
compared[1].base, compared[1].difference.mean, compared[1].other_options
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.points import RATIO, Point, Spread
from launch.results import comparable
from mone_model.accounting import equal_active_width

PLAIN_MOE = {RATIO: 1}
WIDTH = "model.moe_ffn_hidden_size"
BALANCE = "model.neuron_balance_"
HOW_COMPUTED = ("parallel.", "compute.", "engine", "deepspeed.")
"""Prefixes of options that change the result of training by rounding only."""
MATTERS = ("compute.precision",)
"""Options that match HOW_COMPUTED but do change the result."""


@dataclass(frozen=True)
class Comparison:
    """A point and its baseline."""

    base: Point
    difference: Spread
    """Validation loss minus the baseline's, nats per token: one value for each pair of runs with the same seeds; without
    such pairs, the difference of the means."""
    paired: bool
    """Whether `difference` compares runs with the same seeds."""
    other_options: dict[str, tuple[Any, Any]]
    """Other options that differ, beside those that define the baseline: this point's value and the baseline's."""


def compare(
    points: Sequence[Point], *, named: Point | None = None, wanted: Mapping[str, Any] = PLAIN_MOE
) -> list[Comparison | None]:
    """Each point's comparison; None for a baseline and for a point without a baseline.

    named: the baseline of all points. Without it, the baseline of a point has the options `wanted` and otherwise the same
    options that affect the result.
    """
    found: list[Comparison | None] = []
    for point in points:
        candidates = [(named, 0)] if named is not None else _candidates(point, points, wanted)
        base = min(candidates, key=lambda candidate: candidate[1:])[0] if candidates else None
        found.append(None if base is None or base is point else _comparison(point, base, wanted if named is None else {}))
    return found


def _candidates(point: Point, points: Sequence[Point], wanted: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Possible baselines of a point, each with its sort key; the smallest key is the closest baseline."""
    if _has(point, wanted):
        return []
    found = []
    for number, base in enumerate(points):
        if not _has(base, wanted):
            continue
        differing = {name for name in differing_options(point, base) if name not in wanted}
        mattering = {name for name in differing if _matters(name, base)}
        # A sweep over the ratio may compute another option from it.
        swept = dict(wanted) == PLAIN_MOE and bool(point.group) and point.series == base.series
        equal_active = mattering == {WIDTH} and point.model.moe_ffn_hidden_size == equal_active_width(
            base.model.moe_ffn_hidden_size, point.ratio
        )
        if swept or not mattering or (equal_active and base.ratio == 1):
            seeds = {run.seeds for run in point.complete} & {run.seeds for run in base.complete}
            rank = (not swept, bool(mattering), not base.complete, point.group != base.group, -len(seeds), len(differing))
            found.append((base, *rank, number))
    return found


def _matters(name: str, base: Point) -> bool:
    if name.startswith(BALANCE):
        # If all neurons are kept, the normalised loss is constant, so its coefficient has no effect.
        constant = base.ratio == 1 and base.model.neuron_balance_form == "normalised"
        return not constant and base.model.neuron_balance_coeff > 0
    return name in MATTERS or not name.startswith(HOW_COMPUTED)


def _has(point: Point, wanted: Mapping[str, Any]) -> bool:
    return all(point.options.get(name) == value for name, value in wanted.items())


def differing_options(point: Point, base: Point) -> dict[str, tuple[Any, Any]]:
    """Options whose values differ: the value in `point` and the value in `base`."""
    ours, theirs = comparable(point.options), comparable(base.options)
    return {name: (ours.get(name), theirs.get(name)) for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)}


def _comparison(point: Point, base: Point, wanted: Mapping[str, Any]) -> Comparison:
    others = {name: values for name, values in differing_options(point, base).items() if name not in wanted}
    difference = point.difference(base)
    paired = bool(difference.values)
    if not paired and point.validation.values and base.validation.values:
        difference = Spread((point.validation.mean - base.validation.mean,))
    return Comparison(base, difference, paired, others)
