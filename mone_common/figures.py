"""matplotlib settings for all figures: no display, no math text, atomic files."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mone_common.files import writing

# Names of runs and sources may contain dollar signs, which matplotlib would parse as formulas.
plt.rcParams["text.parse_math"] = False


def save(figure: Any, path: Path, *, dots: int = 130) -> None:
    """Write a figure and close it; dots: per inch."""
    try:
        with writing(path) as temporary:
            figure.savefig(temporary, dpi=dots)
    finally:
        plt.close(figure)
