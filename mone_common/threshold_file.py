"""Output files of mone-calibrate and mone-sparsify: thresholds of a model, by ratio and layer. Imports no torch.

thresholds_L = read_thresholds(Path("study/thresholds.json"), ratio=0.25)
"""

import json
from pathlib import Path
from typing import NamedTuple

from mone_common.checks import check, is_number
from mone_common.run_folder import DamagedFile, read_file


class ThresholdFile(NamedTuple):
    """The content of such a file."""

    path: Path
    by_ratio: dict[float, list[float]]
    """For each ratio one threshold for each layer that has experts."""
    model_type: str | None
    """Of the model that was studied; None if the file does not say it."""
    layers: list[int] | None
    """The numbers of the layers that have experts; None: all layers."""

    def at(self, ratio: float | None) -> tuple[float, list[float]]:
        """A ratio and its thresholds; DamagedFile if it is not in the file. None: the only one."""
        if ratio is None and len(self.by_ratio) == 1:
            (ratio,) = self.by_ratio
        if ratio not in self.by_ratio:
            known = ", ".join(f"{each:g}" for each in self.by_ratio)
            raise DamagedFile(
                f"thresholds={self.path}: has thresholds for the ratios {known}; choose one of them (ratio={ratio})"
            )
        return ratio, self.by_ratio[ratio]

    def by_layer(
        self, ratio: float | None, *, option: str, model_type: str, layers: list[int]
    ) -> tuple[float, dict[int, float]]:
        """The ratio, and its thresholds by the number of the layer; ValueError if they are not of this model.

        ratio: None: the only one of the file. option: the name of the option that gives the file, for messages.
        layers: the numbers of the model's layers that have experts.
        """
        ratio, found = self.at(ratio)
        its = self.model_type
        text = f"they are of a model of the type {its}, this one is {model_type}"
        check(its in (None, model_type), option, self.path, text)
        numbers = self.layers if self.layers is not None else list(range(len(found)))
        text = f"it has thresholds for the layers {_short(numbers)}, the experts of this model are in {_short(layers)}"
        check(numbers == layers and len(found) == len(numbers), option, self.path, text)
        return ratio, dict(zip(numbers, found, strict=True))


def _short(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]} ({len(layers)})" if layers else "none"


def read_threshold_file(path: Path, *, ratio: float | None = None) -> ThresholdFile:
    """Read the file; DamagedFile. ratio: what a file means that does not name its ratio."""
    try:
        found = json.loads(read_file(path) or b"")
        layers = None
        if "parts" in found:
            part = found["parts"].get("routed", found["parts"].get("dense"))
            by_ratio = {float(name): its for name, its in part["ratios"].items()}
            layers = part["layers"]
        else:
            by_ratio = {float(found.get("ratio", ratio or 0)): found["thresholds"]}
        if not all(isinstance(its, list) and all(map(is_number, its)) for its in by_ratio.values()):
            raise ValueError("thresholds must be a list of numbers")
        return ThresholdFile(path, by_ratio, found.get("model_type"), layers)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedFile(
            f"thresholds={path}: is missing or not an output file of mone-calibrate or mone-sparsify ({error})"
        ) from error


def read_thresholds(path: Path, *, ratio: float | None = None) -> list[float]:
    """The thresholds of one ratio, one for each layer with experts; DamagedFile. ratio: None: the only one of the file."""
    return read_threshold_file(path, ratio=ratio).at(ratio)[1]
