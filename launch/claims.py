"""Verdicts on claims, from the tested differences between points.

    claim = Claim("half of the neurons are enough", ["equal_total/half", "equal_total/plain"], says="equal")
    verdict(claim.says, test, p)                       # "holds", "does not hold", "not decided", with the reason

An end such as @ratio_1_4 names an evaluation of the point: equal_total/plain@ratio_1_4 is the plain model at ratio 1/4.
"""

from dataclasses import dataclass, field

from launch.statistics import LEVEL, Contrast
from mone_common.console import UserError

SAYS = ("equal", "better")


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


def verdict(says: str, test: Contrast, p: float) -> str:
    """Whether a claim holds, and why; p: of no difference, corrected where several tests count together.

    Within the margin an equal loss is shown, but a lower loss is not refuted: it may be lower by less.
    """
    within = f"within ±{test.margin:g}"
    if says == "equal" and test.equivalent:
        return f"holds: {within}"
    size = f", {within}" if test.equivalent else ""
    if p < 1 - LEVEL:
        return f"holds: lower loss{size}" if test.mean < 0 else f"does not hold: higher loss{size}"
    return f"not decided{size}"
