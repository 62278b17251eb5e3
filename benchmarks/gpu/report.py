"""The results: one JSON file, rewritten after each part, and tables on the console.

report = Report(Path("report/gpu.json"), machine, interpreted=False)
report.add({"kind": "check", "group": "silu bf16", "name": "silu bf16 H=37 K=5", "passed": True, "worst": 0.3})
report.save()
"""

import importlib.metadata
import json
import platform
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.isolation import Record
from mone_common.files import writing


class Report:
    """Records, and whether all of them are good."""

    def __init__(self, path: Path, machine: dict[str, Any], *, interpreted: bool) -> None:
        self.path, self.start, self.lock = path, time.time(), threading.Lock()
        self.content: dict[str, Any] = {
            "complete": False, "seconds": 0.0, "interpreted": interpreted, "machine": machine,
            "checks": [], "measurements": [], "skipped": [],
        }  # fmt: skip

    def add(self, record: Record) -> None:
        """Keep a record, and print it now if it failed or was skipped."""
        lists = {"check": "checks", "measurement": "measurements", "skipped": "skipped"}
        with self.lock:
            self.content[lists[record["kind"]]].append({name: value for name, value in record.items() if name != "kind"})
        if record["kind"] == "skipped":
            self.say(f"skipped: {record['name']}: {record['reason']}")
        elif not record["passed"]:
            self.say(f"FAILED: {record['group']}: {record['name']}: {describe_failure(record)}")

    def say(self, line: str) -> None:
        """Print a line of progress."""
        print(f"[{time.time() - self.start:6.1f} s] {line}", flush=True)

    def save(self, *, complete: bool = False) -> None:
        """Write all there is; the file is whole at any time."""
        with self.lock:
            self.content |= {"complete": complete, "seconds": round(time.time() - self.start, 1)}
            text = json.dumps(self.content, indent=1, allow_nan=False)
            with writing(self.path) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")

    @property
    def failures(self) -> list[Record]:
        """Checks and measurements that failed."""
        return [record for record in self.content["checks"] + self.content["measurements"] if not record["passed"]]

    def tables(self) -> str:
        """All in Markdown: checks by group, then measurements by shape."""
        return "\n\n".join(filter(None, [self._checks(), *self._few_rows(), *self._measurements(), self._others()]))

    def _checks(self) -> str:
        groups: dict[str, list[Record]] = {}
        for record in self.content["checks"]:
            groups.setdefault(record["group"], []).append(record)
        rows = []
        for group, records in groups.items():
            measured = [record for record in records if "worst" in record]
            worst = max(measured, key=lambda record: _as_number(record["worst"]), default=None)
            failed = sum(not record["passed"] for record in records)
            where = f"{worst['quantity']}, {worst['name']}" if worst else ""
            rows.append([group, len(records) - failed, failed, worst["worst"] if worst else "", where])
        return table(["checks", "passed", "failed", "largest error / allowed", "where"], rows)

    def _few_rows(self) -> list[str]:
        """For each shape: microseconds by contender and number of rows, and the share of the plain MoE's."""
        shapes: dict[str, dict[tuple[str, float], dict[int, Record]]] = {}
        for record in self.content["measurements"]:
            if record.get("microseconds"):
                of_shape = shapes.setdefault(record["shape"], {})
                of_shape.setdefault((record["contender"], record["ratio"]), {})[record["rows"]] = record
        tables = []
        for shape, contenders in shapes.items():
            plain = contenders.get(("plain MoE", 1.0), {})
            numbers = sorted({number for records in contenders.values() for number in records})

            def cell(record: Record | None, plain: dict[int, Record] = plain) -> str:
                if record is None:
                    return ""
                microseconds, mark = record["microseconds"]["median"], "" if record["graph"] else " *"
                whole = plain.get(record["rows"])
                share = f" ({microseconds / whole['microseconds']['median']:.2f})" if whole else ""
                return f"{microseconds:.1f}{share}{mark}"

            rows = [
                [name, f"{ratio:g}", *(cell(records.get(number)) for number in numbers)]
                for (name, ratio), records in contenders.items()
            ]
            head = ["contender", "ratio", *(f"{number} rows" for number in numbers)]
            title = f"few rows, {shape}, bf16, forward: microseconds (share of the plain MoE); *: without a CUDA graph"
            tables.append(f"{title}\n\n{table(head, rows)}")
        return tables

    def _measurements(self) -> list[str]:
        groups: dict[tuple[str, str], list[Record]] = {}
        for record in self.content["measurements"]:
            if record["passed"] and record.get("forward_ms"):
                groups.setdefault((record["what"], record["shape"]), []).append(record)
        tables = []
        for (what, shape), records in groups.items():
            # The best dense form in torch is the one to beat.
            dense = [
                _whole(record) for record in records if record["ratio"] == 1 and record["contender"].startswith("torch")
            ]
            rows = [
                [
                    record["contender"], f"{record['ratio']:g}", f"{record['forward_ms']['median']:.3f}",
                    f"{record['backward_ms']['median']:.3f}",
                    f"{_whole(record) / min(dense):.2f}" if dense else "",
                    f"{record['peak_bytes'] / 2**30:.2f}", f"{record['kept_bytes'] / 2**30:.2f}",
                ]
                for record in records
            ]  # fmt: skip
            head = [
                "contender",
                "ratio",
                "forward ms",
                "backward ms",
                "both / best torch, ratio 1",
                "peak GiB",
                "kept GiB",
            ]
            tables.append(f"{what}, {shape}, bf16\n\n{table(head, rows)}")
        return tables

    def _others(self) -> str:
        rows = []
        for record in self.content["measurements"]:
            if record["passed"] and "rate" in record:
                rows.append([record["name"], f"{record['rate']} {record['unit']}"])
            elif record["passed"] and "step_ms" in record:
                peak = f"{record['peak_bytes'] / 2**30:.1f} GiB" if record["peak_bytes"] else "memory not measured"
                layers = "Transformer Engine" if record["transformer_engine"] else "Megatron-Core's layers"
                speed = f"{record['tokens_per_second']} tokens/s, {record['step_ms']} ms for {record['tokens']} tokens"
                rows.append([record["name"], f"{speed}, {peak}, {record['precision']}, {layers}"])
        return table(["measured", "result"], rows) if rows else ""


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table whose columns are aligned."""
    cells = [[str(cell) for cell in row] for row in [head, ["---"] * len(head), *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    )


def describe_failure(record: Record) -> str:
    """In one line."""
    if "error" in record:
        return record["error"].strip().splitlines()[-1][:300]
    return f"{record['quantity']} of row {record['row']!r}: error is {record['worst']} of what is allowed"


def _whole(record: Record) -> float:
    return record["forward_ms"]["median"] + record["backward_ms"]["median"]


def _as_number(share: float | str) -> float:
    return float("inf") if share == "infinite" else float(share)


def describe_machine() -> dict[str, Any]:
    """Versions, and the output of nvidia-smi for the GPU; None where a value is not available."""
    import torch

    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
    smi = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    found = dict(zip(fields.split(","), (value.strip() for value in smi.split(",")), strict=False)) if smi else None
    versions: dict[str, str | None] = {"torch": torch.__version__}
    for package in ("triton", "megatron-core", "transformer-engine"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "capability": list(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None,
        "nvidia_smi": found,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "commit": _output("git", "rev-parse", "HEAD"),
    }


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
