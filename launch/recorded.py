"""Records of runs: one small JSON file each, without weights, from which reports are made again.

(run,) = read_runs([Path("runs/evidence/equal_total/plain,seed=1")])
write_record(run, Path("docs/evidence/runs/equal_total/plain,seed=1.json"))
run = read_record(path)                                  # launch.points.Run
run.evaluations["trained"].nats_per_token

A record has the options, the loss curve, the last value of each metric, and the losses of each document that `mone-evaluate`
scored (evaluations/*.json in the run folder).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from launch.points import TRAINED, UNDISTURBED, Evaluation, Run
from mone_common.files import writing
from mone_common.run_folder import ENVIRONMENT_FILE, DamagedFile, read_file
from mone_common.text import printable

FORMAT = "mone-run-1"
START = f'{{\n"format": "{FORMAT}"'.encode()
"""First bytes of a record."""
CURVE = ("step", "train/tokens", "train/loss")
"""Metrics of which a record has the whole series."""


def write_record(run: Run, path: Path) -> None:
    """Write the record of a run; ValueError if it is not complete."""
    if run.state != "complete":
        raise ValueError(f"{printable(run.folder)}: {run.state}, not complete")
    content = {
        "format": FORMAT,
        "state": run.state,
        "commit": run.commit,
        "environment": json.loads(read_file(run.folder / ENVIRONMENT_FILE) or b"{}"),
        "options": run.options,
        "reading": run.reading,
        "records": _shorten(run),
        "evaluations": {name: dataclasses.asdict(found) for name, found in run.evaluations.items()},
    }
    with writing(path) as unfinished:
        # One line for each entry: a change of one run changes few lines.
        entries = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
        unfinished.write_text(f"{{\n{entries}\n}}\n", encoding="utf-8")


def _shorten(run: Run) -> list[dict[str, Any]]:
    """The loss curves, then one record with the last value of all other metrics."""
    curve = [{name: record[name] for name in CURVE} for record in run.records if all(name in record for name in CURVE)]
    validations = [
        {"step": record["step"], **losses}
        for record in run.records
        if (losses := {name: value for name, value in record.items() if name.startswith("validation/")})
    ]
    last: dict[str, Any] = {}
    for record in run.records:
        last |= {name: value for name, value in record.items() if not name.startswith(("validation/", "train/"))}
    costs = {
        "speed/tokens_per_second": run.tokens_per_second,
        UNDISTURBED: run.undisturbed_speed,
        TRAINED: run.trained_tokens,
    }
    return [*curve, *validations, last | costs | {"memory/peak_gib": run.peak_gib}]


def find_records(folder: Path) -> list[Path]:
    """The records in a folder and its subfolders, or the file itself if it is one."""
    paths = [folder] if folder.is_file() else sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])
    return [path for path in paths if _starts_like_a_record(path)]


def _starts_like_a_record(path: Path) -> bool:
    try:
        return (read_file(path) or b"").startswith(START)
    except DamagedFile:
        return False


def read_record(path: Path) -> Run:
    """The run of a record; DamagedFile if the file is none."""
    try:
        content = json.loads(read_file(path) or b"")
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return Run(
            folder=path,
            options=content["options"],
            records=content["records"],
            state=content["state"],
            reading=content["reading"],
            commit=content["commit"],
            processor=content["environment"].get("processor"),
            evaluations={
                name: Evaluation(**found | {"sources": [tuple(source) for source in found["sources"]]})
                for name, found in content["evaluations"].items()
            },
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{printable(path)}: not the record of a run ({error})") from error
