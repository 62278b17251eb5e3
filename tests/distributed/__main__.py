"""Measure the difference between each layout and one process, for the table of docs/parallelism.md.

python -m tests.distributed
"""

import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.test_layouts import LAYOUTS, cases_of
from tests.distributed.worker import run_cases


def largest(actual: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - e) / abs(e) for a, e in zip(actual, expected, strict=True))


def row(layout: str, processes: int, found: dict[str, Any]) -> str:
    """Largest relative differences over all cases of a layout."""
    cases = [
        (found[f"{layout}/{case}"], found[f"one/{case}"])
        for case in ("smooth/unmasked", "sparse/normalised", "sparse/masked")
    ]
    steps = [(found[f"{layout}/{kind}/steps"], found[f"one/{kind}/steps"]) for kind in ("smooth", "sparse")]
    gradients = max(
        ((a["gradients"][name] - g).norm() / g.norm()).item() for a, e in cases for name, g in e["gradients"].items()
    )
    auxiliary = max(
        ((a["auxiliary"][name] - v).abs() / v.abs()).max().item() for a, e in cases for name, v in e["auxiliary"].items()
    )
    losses = max(largest(a["losses"], e["losses"]) for a, e in cases + steps)
    norms = max(largest(a["norms"], e["norms"]) for a, e in cases + steps)
    return f"| `{layout}` | {processes} | {losses:.0e} | {norms:.0e} | {gradients:.0e} | {auxiliary:.0e} |"


def main() -> None:
    """Print the table in Markdown."""
    print("| layout | processes | loss | gradient norm | each weight's gradient | auxiliary losses |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        found = run_cases({processes: cases_of(processes) for processes in LAYOUTS}, Path(folder))
    for processes, layouts in LAYOUTS.items():
        for layout in layouts if processes > 1 else ():
            print(row(layout, processes, found))


if __name__ == "__main__":
    main()
