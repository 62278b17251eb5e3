"""Verdicts on claims, from the tested differences between points.

    claim = Claim("half of the neurons are enough", ["equal_total/half", "equal_total/plain"], says="equal")
    verdict(claim.says, test, planned=5)               # "holds", "does not hold", "not decided", with the reason

An end such as @ratio_1_4 names an evaluation of the point: equal_total/plain@ratio_1_4 is the plain model at ratio 1/4.
"""

from dataclasses import dataclass, field

from launch.statistics import LEVEL, Contrast
from mone_common.console import UserError

SAYS = ("equal", "better")
OUTCOMES = HOLDS, REFUTED, UNDECIDED = "holds", "does not hold", "not decided"


@dataclass
class Claim:
    """A statement about the difference between two points."""

    claim: str = ""
    """The statement."""
    contrast: list[str] = field(default_factory=list)
    """The point and the baseline, each EXPERIMENT/POINT or EXPERIMENT/POINT@EVALUATION."""
    says: str = "equal"
    """equal: the loss is that of the baseline, within the margin, or lower; better: it is lower."""

    def __post_init__(self) -> None:
        if self.says not in SAYS:
            raise UserError(f"claims: says={self.says}: choose from {', '.join(SAYS)}")
        if len(self.contrast) != 2:
            raise UserError(f"claims: contrast={self.contrast} must be a pair, [point, baseline]")


def verdict(says: str, test: Contrast, *, planned: int) -> str:
    """Whether a claim holds, and what is shown about the loss; with fewer pairs of runs than planned, how many there are.

    An "equal" claim is refuted by a loss that is higher by more than the margin, a "better" claim by a higher loss.
    """
    if test.pairs < planned:
        return f"{test.pairs} of {planned} seeds"
    lower, higher = (test.p < 1 - LEVEL and sign * test.mean > 0 for sign in (-1, 1))
    shown = ["lower loss"] * lower + ["higher loss"] * higher + [f"within ±{test.margin:g}"] * test.equivalent
    if says == "equal":
        holds, refuted = test.equivalent or lower, test.p_above < 1 - LEVEL
    else:
        holds, refuted = lower, higher
    outcome = HOLDS if holds else REFUTED if refuted else UNDECIDED
    return f"{outcome}: {', '.join(shown)}" if shown else outcome
