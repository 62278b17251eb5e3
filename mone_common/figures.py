"""matplotlib as every picture of ours uses it: without a display, text as it stands, files whole or absent."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mone_common.files import writing

# Names of runs and sources are shown as they are; with a dollar sign they would be read as formulas, and most refused.
plt.rcParams["text.parse_math"] = False


def save(figure: Any, path: Path, *, dots: int = 130) -> None:
    """Write a picture with that many dots an inch, and close it."""
    try:
        with writing(path) as temporary:
            figure.savefig(temporary, dpi=dots)
    finally:
        plt.close(figure)
