"""Summarises a comparison in one sentence: the difference to the baseline and how certain it is.

print(sentence(points, compare(points), "the plain MoE"))
"""

from collections.abc import Sequence

from launch.baselines import Comparison
from launch.points import Point, Spread
from launch.results import labels
from launch.statistics import LEVEL, contrast


def sentence(points: Sequence[Point], compared: Sequence[Comparison | None], baseline: str) -> str:
    """The summary sentence; baseline: name of the baseline in it."""
    names = dict(zip(map(id, points), labels(points), strict=True))
    measured = [point for point in points if point.validation.values]
    differences = [
        (names[id(point)], point, comparison)
        for point, comparison in zip(points, compared, strict=True)
        if comparison is not None and comparison.difference.values
    ]
    if not measured:
        return "No complete run has a validation loss, so there is nothing to compare yet."
    if not differences:
        waited_for = {id(point): comparison.base for point, comparison in zip(points, compared, strict=True) if comparison}
        return _without_baseline(measured, names, baseline, waited_for)
    if len(differences) == 1:
        name, point, comparison = differences[0]
        return _of_one(name, point, comparison, names[id(comparison.base)], baseline)
    return _of_several([(name, comparison) for name, _, comparison in differences], baseline)


def _without_baseline(measured: Sequence[Point], names: dict[int, str], baseline: str, waited_for: dict[int, Point]) -> str:
    """waited_for: baselines that have no validation loss yet, by the id of the compared point."""
    best = min(measured, key=lambda point: point.validation.mean)
    name, loss = names[id(best)], f"{best.validation} nats per token{_over(best.validation)}"
    if id(best) in waited_for:
        missing = f"its baseline {names[id(waited_for[id(best)])]} ({baseline}) has no result yet"
    else:
        missing = f"there is no run of {baseline} with otherwise the same options"
    if len(measured) > 1:
        return f"{name} has the lowest validation loss of {len(measured)} points, {loss}, but {missing}."
    if best.ratio == 1:
        return f"{name}, a plain MoE, ends at a validation loss of {loss}, and no other point is complete."
    return f"{name} ends at a validation loss of {loss}, and {missing}."


def _of_one(name: str, point: Point, comparison: Comparison, base: str, baseline: str) -> str:
    difference, loss = comparison.difference, f"{comparison.base.validation.mean:.4f}"
    against = f"{base} ({loss})" if base == baseline else f"{baseline} ({base}, {loss})"
    touched = f"touches {point.parameters.active_expert_params:.1%} of its experts' weights for each token"
    amount = "the same as" if difference.mean == 0 else f"{_size(difference)} {'below' if difference.mean < 0 else 'above'}"
    ends = f"ends at a validation loss of {point.validation.mean:.4f} nats per token, {amount} that of {against}"
    return f"{name}, which {touched}, {ends}: {_certainty(comparison)}."


def _of_several(differences: Sequence[tuple[str, Comparison]], baseline: str) -> str:
    count = len(differences)
    name, best = min(differences, key=lambda found: found[1].difference.mean)
    difference = best.difference
    size = f"{_size(difference)} nats per token {'below' if difference.mean < 0 else 'above'}"
    lowest = f"the lowest is {name}, {'equal to' if difference.mean == 0 else size} {baseline}"
    if all(comparison.paired and len(comparison.difference.values) == 1 for _, comparison in differences):
        below = sum(comparison.difference.mean < 0 for _, comparison in differences)
        return (
            f"The validation loss is lower than that of {baseline} at {below or 'none'} of {count} points; {lowest}; "
            "each point has one pair of runs, so any of these differences may be chance."
        )
    lower, higher = (sum(_sign(comparison) == sign for _, comparison in differences) for sign in (-1, 1))
    parts = [f"lower in every seed at {lower or 'none'} of {count} points", f"higher in every seed at {higher or 'none'}"]
    if undecided := count - lower - higher:
        parts.append(f"undecided at {undecided} (the seeds disagree or differ, or there is one seed)")
    return (
        f"Compared with {baseline}, the validation loss is {', '.join(parts)}; {lowest}{_over(difference)}{_interval(best)}."
    )


def _sign(comparison: Comparison) -> int:
    """-1 or 1 if several pairs of runs agree, else 0."""
    values = comparison.difference.values
    if len(values) < 2 or not comparison.paired:
        return 0
    return -1 if max(values) < 0 else 1 if min(values) > 0 else 0


def _certainty(comparison: Comparison) -> str:
    count = len(comparison.difference.values)
    if not comparison.paired:
        return "their seeds differ, so chance or the order of the data may cause the difference"
    if count == 1:
        return "one seed each, so the difference may be chance"
    direction = "lower" if comparison.difference.mean < 0 else "higher"
    if _sign(comparison) != 0:
        return f"{direction} in each of {count} seeds{_interval(comparison)}"
    if contrast(comparison.difference.values, margin=1.0).p < 1 - LEVEL:
        return f"{direction} on average over {count} seeds, but not in each{_interval(comparison)}"
    return f"the {count} seeds disagree, so the sign of the difference is open{_interval(comparison)}"


def _interval(comparison: Comparison) -> str:
    """The 95 % interval of the difference, if there are several pairs of runs."""
    values = comparison.difference.values
    if not comparison.paired or len(values) < 2:
        return ""
    found = contrast(values, margin=1.0)
    return f" (95 % interval {found.low:+.4f} to {found.high:+.4f})"


def _size(difference: Spread) -> str:
    return str(Spread(tuple(value if difference.mean >= 0 else -value for value in difference.values)))


def _over(found: Spread) -> str:
    return f" over {len(found.values)} seeds" if len(found.values) > 1 else " in one seed"
