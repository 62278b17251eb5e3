"""The section `init` of a run's configuration: initial weights from an existing model, or a branch of a run."""

from dataclasses import dataclass, field

from mone_common.checks import check
from mone_model.config import CHANGEABLE
from train.config_sections import check_least


@dataclass
class InitConfig:
    """Initial weights from an existing model (docs/hugging_face.md), or a branch of a run (docs/checkpoints.md)."""

    source: str | None = None
    """Folder of a Hugging Face model, a run or a checkpoint; null: random weights. `mone-import` prints the options of the
    model. model.activation_ratio, coefficients of losses, dropout and model.seq_length can differ from the source."""
    step: int | None = None
    """Step of the checkpoint, if the source is a run; null: the newest."""
    branch: bool = False
    """Branch off the source, a run or a checkpoint: also take its optimizer state, its step and its position in the data.
    training.steps and the learning-rate schedule count from the start of the source. Several runs can branch off one
    checkpoint, e.g. to decay the learning rate at several steps, or to continue it with another model.activation_ratio."""
    change: list[str] = field(default_factory=list)
    """Other fields of the model that differ from the source on purpose, e.g. [rotary_base]; they must not change tensors."""
    upcycle: bool = False
    """Make the experts of a dense source copies of its MLP (arXiv 2212.05055)."""
    upcycle_splits: int = 1
    """Split each copy into this many narrower experts; model.moe_ffn_hidden_size times it is the width of the MLP."""
    upcycle_noise: float = 0.0
    """Standard deviation of Gaussian noise that is added to each matrix of each expert, as a fraction of the standard
    deviation of the matrix itself."""

    def __post_init__(self) -> None:
        check(self.source is None or self.source.strip() != "", "init.source", repr(self.source), "must be null or a folder")
        check(self.step is None or self.step >= 0, "init.step", self.step, "must be null or at least 0")
        check(set(self.change) <= set(CHANGEABLE), "init.change", self.change, f"choose from {', '.join(CHANGEABLE)}")
        check(
            not self.branch or self.source is not None,
            "init.branch",
            self.branch,
            "needs init.source, a run or a checkpoint",
        )
        check(not (self.branch and self.upcycle), "init.upcycle", self.upcycle, "a branch keeps the experts of its source")
        check(not self.upcycle or self.source is not None, "init.upcycle", self.upcycle, "needs init.source, a dense model")
        check_least("init", self, 1, "upcycle_splits")
        check_least("init", self, 0, "upcycle_noise")
        for name, value, off in (
            ("upcycle_splits", self.upcycle_splits, 1),
            ("upcycle_noise", self.upcycle_noise, 0),
        ):
            check(self.upcycle or value == off, f"init.{name}", value, "needs init.upcycle=true")
