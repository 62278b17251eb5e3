"""Records of evaluations: one JSON file each, with what is needed to repeat it; tables on the console; W&B.

path = find_output(None, home=Path("runs/demo"))         # runs/demo/evaluations/20250101T120000.json
write_result(path, {**environment(options), "model": ..., "text": ..., "tasks": ...})
result = read_result(path)                               # UserError if it is another file
print(table(result))
"""

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mone_common.checkout import commit
from mone_common.console import UserError
from mone_common.files import writing
from mone_common.wandb_runs import wandb_settings

FORMAT = "mone-evaluation-1"
EVALUATIONS = "evaluations"
"""Folder of the results in the folder of a run or model."""
PACKAGES = ("mone", "torch", "transformers", "datasets", "lm_eval")


def find_output(output: str | None, *, home: Path | None) -> Path:
    """The file to write; UserError if it exists or cannot be written.

    home: folder of the run or model, which gets the file unless `output` names another.
    """
    if output is None and home is None:
        raise UserError("output=null: name the file to write, like output=comparison.json")
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    path = Path(output) if output is not None else Path(str(home)) / EVALUATIONS / f"{stamp}.json"
    if os.path.lexists(path):
        raise UserError(f"output={path}: exists; remove it, or give another file")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output={path}: {existing} cannot be written; give another file, like output=result.json")
    return path


def environment(options: dict[str, Any]) -> dict[str, Any]:
    """What a record begins with: format, time, command, options, commit, versions, machine."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.orig_argv,
        "options": options,
        "commit": commit(),
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a record atomically; UserError if the disk refuses it."""
    try:
        with writing(path) as unfinished:
            unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"output={path}: cannot be written ({error})") from error


def read_result(path: Path) -> dict[str, Any]:
    """A record; UserError if the file is missing or is none."""
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a result of mone-evaluate ({error})") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UserError(f"{path}: not a result of mone-evaluate; its format must be {FORMAT}")
    return result


def read_evaluations(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each record in the folder of a run, oldest first; UserError at a file that is none."""
    for path in sorted((run / EVALUATIONS).glob("*.json")):
        yield path.stem, read_result(path)


def table(result: dict[str, Any]) -> str:
    """The scores of a record as aligned lines."""
    return align(("", "score", "value [95 % interval] or ± standard error"), score_rows(result))


def score_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Text or task, name of the score, and its value, for each score of a record."""
    rows = []
    if text := result.get("text"):
        for name, title in (
            ("nll_per_token", "nats per token"),
            ("perplexity", "perplexity"),
            ("bits_per_byte", "bits per byte"),
        ):
            rows.append((text["name"], title, show(text[name])))
    for task, found in result.get("tasks", {}).get("results", {}).items():
        if found["shown"]:
            rows += [(task, metric, show(value)) for metric, value in found["metrics"].items()]
    if comparison := result.get("comparison"):
        rows += [("difference", name.replace("_", " "), show(value)) for name, value in comparison["differences"].items()]
    return rows


def show(value: Any) -> str:
    """A number with four digits, and its interval or standard error if it has one."""
    if not isinstance(value, dict):
        return f"{value:.4f}" if isinstance(value, float) else str(value)
    if value.get("low") is not None:
        return f"{value['value']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"
    error = value.get("stderr")
    return f"{value['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def align(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (headings, *rows)
    )


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """The scores of a record by dotted names, such as text/bits_per_byte and tasks/arc_easy/acc."""
    found: dict[str, float] = {}
    if text := result.get("text"):
        found |= {f"text/{name}": text[name]["value"] for name in ("nll_per_token", "perplexity", "bits_per_byte")}
    for task, its in result.get("tasks", {}).get("results", {}).items():
        found |= {f"tasks/{task}/{metric}": value["value"] for metric, value in its["metrics"].items()}
    for name, value in result.get("comparison", {}).get("differences", {}).items():
        found[f"difference/{name}"] = value["value"]
    return found


def send_to_wandb(result: dict[str, Any], *, mode: str, project: str, folder: Path) -> None:
    """Log the scores as a W&B run; an error of W&B is printed, since the file is written already."""
    import wandb

    kept: dict[str, Any] = {name: result[name] for name in ("options", "commit", "packages", "model") if name in result}
    try:
        run = wandb.init(
            project=project,
            job_type="evaluation",
            dir=str(folder.absolute()),
            config=kept,
            mode=mode,  # type: ignore[arg-type]
            settings=wandb_settings(),
        )
        run.log(numbers(result))
        run.finish()
    except Exception as error:  # no network, login or server
        print(f"no W&B run of the evaluation ({error})", file=sys.stderr)
