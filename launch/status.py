"""Say how runs are doing, in a table.

    mone-status runs/*               # or a sweep's folder: all its points

What is damaged in a run's folder is named on stderr; the rest of it, and the other runs, are told all the same.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from launch.restarts import examine_attempts
from mone_common.console import Parser
from mone_common.run_folder import CONFIG_FILE, DamagedFile, check_readable, find_runs, saved_steps
from mone_common.run_records import examine_metrics, is_number, read_config, read_state, read_status
from mone_common.text import clock, printable

Read = TypeVar("Read")

COLUMNS = ("run", "state", "step", "of", "loss", "validation", "tokens/s", "last record", "checkpoint", "restarts")


def main() -> None:
    """Print a line a run; exit code 2 if a folder holds none."""
    parser = Parser(prog="mone-status", description="Say how runs are doing.")
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
    else:
        print_table(rows)
    for row in rows:
        for problem in row["problems"]:
            print(problem, file=sys.stderr)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """COLUMNS of these runs, aligned."""
    table = [COLUMNS, *(tuple(_cell(name, row[name]) for name in COLUMNS) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def describe(run: Path) -> dict[str, Any]:
    """What is known of a run: COLUMNS, with None for what it has not said yet; times in seconds since 1970.

    reason: why it ended so; problems: what of its folder is damaged.
    """
    problems = list[str]()

    def tried(read: Callable[[Path], Read]) -> Read | None:
        try:
            return read(run)
        except DamagedFile as error:
            problems.append(str(error))
            return None

    latest = dict[str, Any]()
    tried(check_readable)
    unreadable = list(problems)
    options, status, saved = tried(read_config) or {}, tried(read_status) or {}, tried(saved_steps) or []
    records, damaged_records = tried(examine_metrics) or ([], None)
    attempts, damaged_attempts = tried(lambda run: examine_attempts(run / "launch")) or ([], None)
    for record in records:
        latest |= {name: value if is_number(value) else None for name, value in record.items()}
    problems += [problem for problem in (damaged_records, damaged_attempts) if problem]
    if not options and not problems:
        problems.append(f"{printable(run)}: no {CONFIG_FILE}")
    return {
        "run": printable(run),
        "state": printable(tried(read_state) or "damaged"),
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
