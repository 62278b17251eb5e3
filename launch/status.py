"""Say how runs are doing, in a table.

mone-status runs/*               # or a sweep's folder: all its points
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from configs.run_folder import find_runs, read_config, read_metrics, read_state, read_status
from launch.restarts import read_attempts

COLUMNS = ("run", "state", "step", "of", "loss", "validation", "tokens/s", "last record", "checkpoint", "restarts")


def main() -> None:
    """Print a line a run; exit code 2 if a folder holds none."""
    parser = argparse.ArgumentParser(prog="mone-status", description="Say how runs are doing.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of a sweep, e.g. runs")
    parser.add_argument("--json", action="store_true", help="a JSON object a line instead of a table")
    options = parser.parse_args()
    try:
        rows = [describe(run) for run in find_runs(options.runs)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if options.json:
        print(*map(json.dumps, rows), sep="\n")
        return
    table = [COLUMNS, *(tuple(_cell(name, row[name]) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def describe(run: Path) -> dict[str, Any]:
    """What is known of a run: COLUMNS, with None for what it has not said yet; times in seconds since 1970."""
    status, latest = read_status(run), dict[str, Any]()
    for record in read_metrics(run):
        latest |= record
    saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    return {
        "run": str(run),
        "state": read_state(run),
        "reason": status.get("reason"),
        "step": latest.get("step", 0),
        "of": read_config(run).get("training.steps"),
        "loss": latest.get("train/loss"),
        "validation": latest.get("validation/loss"),
        "tokens/s": latest.get("speed/tokens_per_second"),
        "last record": latest.get("time"),
        "checkpoint": int(saved[-1].removeprefix("step-")) if saved else None,
        "restarts": sum(attempt.requeued for attempt in read_attempts(run / "launch")),
    }


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "last record":
        minutes = int(time.time() - value) // 60
        return f"{minutes // 60}:{minutes % 60:02d} ago"
    if name in ("loss", "validation"):
        return f"{value:.4f}"
    return f"{value:,.0f}" if name == "tokens/s" else str(value)


if __name__ == "__main__":
    main()
