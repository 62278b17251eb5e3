"""Prints a table with the state of runs.

    mone-status runs/*               # or the folder of a sweep: all its points

Damaged files are reported on stderr. The table contains what the other files of the run say.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from launch.restarts import examine_attempts
from mone_common.checks import is_number
from mone_common.console import Parser
from mone_common.run_folder import CONFIG_FILE, DamagedFile, check_readable, find_runs, saved_steps
from mone_common.run_records import examine_metrics, read_config, read_state, read_status
from mone_common.text import clock, printable

Read = TypeVar("Read")

COLUMNS = ("run", "state", "step", "of", "loss", "validation", "tokens/s", "last record", "checkpoint", "restarts")


def main() -> None:
    """Print one line for each run; exit code 2 if a folder contains none."""
    parser = Parser(prog="mone-status", description="Print a table with the state of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run or of a sweep, e.g. runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    options = parser.parse_args()
    try:
        rows = [describe(run) for run in find_runs(options.runs)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if options.json:
        print(*map(json.dumps, rows), sep="\n")
    else:
        print_table(rows)
    for row in rows:
        for problem in row["problems"]:
            print(problem, file=sys.stderr)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print COLUMNS of these runs as an aligned table."""
    table = [COLUMNS, *(tuple(_cell(name, row[name]) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def describe(run: Path) -> dict[str, Any]:
    """State of a run: a value for each of COLUMNS, None if it is not recorded yet; times in seconds since 1970.

    Further keys: reason (of a failure or stop) and problems (a message for each damaged file).
    """
    problems = list[str]()

    def try_read(read: Callable[[Path], Read]) -> Read | None:
        try:
            return read(run)
        except DamagedFile as error:
            problems.append(str(error))
            return None

    latest = dict[str, Any]()
    try_read(check_readable)
    unreadable = list(problems)
    options, status, saved = try_read(read_config) or {}, try_read(read_status) or {}, try_read(saved_steps) or []
    records, damaged_records = try_read(examine_metrics) or ([], None)
    attempts, damaged_attempts = try_read(lambda run: examine_attempts(run / "launch")) or ([], None)
    for record in records:
        latest |= {name: value if is_number(value) else None for name, value in record.items()}
    problems += [problem for problem in (damaged_records, damaged_attempts) if problem]
    if not options and not problems:
        problems.append(f"{printable(run)}: no {CONFIG_FILE}")
    return {
        "run": printable(run),
        "state": printable(try_read(read_state) or "damaged"),
        "reason": printable(status["reason"]) if status.get("reason") is not None else None,
        "step": latest.get("step", 0),
        "of": options.get("training.steps"),
        "loss": latest.get("train/loss"),
        "validation": latest.get("validation/loss"),
        "tokens/s": latest.get("speed/tokens_per_second"),
        "last record": latest.get("time"),
        "checkpoint": saved[-1] if saved else None,
        "restarts": sum(attempt.requeued for attempt in attempts),
        "problems": unreadable or list(dict.fromkeys(problems)),
    }


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "last record":
        return f"{clock(int(time.time() - value)).rpartition(':')[0]} ago"
    if name in ("loss", "validation"):
        return f"{value:.4f}"
    return f"{value:,.0f}" if name == "tokens/s" else printable(value)


if __name__ == "__main__":
    main()
