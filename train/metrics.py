"""Write metrics to a JSONL file, W&B and the console. docs/metrics.md lists the names.

    writer = MetricsWriter(config, folder, resume_step=200, wandb_id=None)     # on rank 0
    writer.write(step, {"train/loss": 3.2, ...})
    writer.write_figure(step, "neuron_use", path)
    writer.close()

A missing W&B server or login does not stop a run: W&B continues offline, and the JSONL file has all records.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mone_common.files import writing
from mone_common.run_folder import METRICS_FILE
from mone_common.text import clock
from mone_common.wandb_runs import wandb_settings
from train.config import RunConfig, describe

if TYPE_CHECKING:
    import torch

ROOM = 2**16
"""Free bytes that a record needs; W&B writes 32 KiB at a time."""


class MetricsWriter:
    """Writes one record of named numbers per step. After a resume it first moves records of later steps to another file."""

    def __init__(self, config: RunConfig, folder: Path, *, resume_step: int, wandb_id: str | None) -> None:
        self.path = folder / METRICS_FILE
        put_aside(self.path, later_than=resume_step)
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  held open for the run
        self.unwritten = b""
        self.wandb, self.record = _start_wandb(config, folder, wandb_id)
        self.wandb_id: str | None = self.wandb.id if self.wandb is not None else wandb_id
        """Id of the W&B run, to continue it after a resume."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one record."""
        # JSON has no NaN, which undefined values are, such as the overlap among fewer than two experts.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.unwritten += (json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n").encode()
        self._flush()
        self._to_wandb(step, lambda wandb: values)

    def write_figure(self, step: int, name: str, path: Path) -> None:
        """Log an image file of the run folder to W&B."""
        self._to_wandb(step, lambda wandb: {f"figure/{name}": wandb.Image(str(path))})

    def write_histograms(self, step: int, values: dict[str, "torch.Tensor"]) -> None:
        """Log histograms to W&B."""
        self._to_wandb(
            step,
            lambda wandb: {name: wandb.Histogram(tensor.flatten().numpy()) for name, tensor in values.items()},
        )

    def _flush(self) -> None:
        """Write pending records. On a full disk, they are tried again with the next record."""
        try:
            while self.unwritten:
                written = self.file.write(self.unwritten)  # may be partial on a full disk
                self.unwritten = self.unwritten[written:]
        except OSError as error:
            print(f"{self.path}: {error}; records stay in memory until there is space", flush=True)

    def _to_wandb(self, step: int, make: Callable[[Any], dict[str, Any]]) -> None:
        """Log the values that `make` returns for the wandb module."""
        if self.wandb is None:
            return
        import wandb

        try:
            if self.record is not None:
                self.record.check_room()
            self.wandb.log(make(wandb), step=step)
        except Exception as error:  # an error of W&B must not end training
            print(f"W&B failed ({error}); the run continues with {self.path}", flush=True)
            self.wandb = None
            with contextlib.suppress(Exception, SystemExit):  # W&B would otherwise report the error again at exit
                wandb.teardown()

    def close(self) -> None:
        """Close the files."""
        self._flush()
        self.file.close()
        if self.wandb is not None:
            try:
                before = self.record.size() if self.record is not None else 0
                self.wandb.finish()
                if self.record is not None:
                    self.record.check_end(before)
            except Exception as error:  # an error of W&B must not end the run
                print(f"W&B did not finish ({error})", flush=True)


class OfflineRecord:
    """The file that W&B writes for `wandb sync`. On a full disk, W&B silently omits the rest."""

    def __init__(self, path: Path) -> None:
        self.path, self.warned = path, False

    def size(self) -> int:
        """Size in bytes."""
        return self.path.stat().st_size

    def check_room(self) -> None:
        """Warn, once, if the disk has no space for the next record."""
        if shutil.disk_usage(self.path.parent).free < ROOM:
            self._warn("the disk is full")

    def check_end(self, before: int) -> None:
        """Warn, once, if the last records are missing; before: the size before W&B finished the file."""
        if self.size() <= before:
            self._warn("its end is missing")

    def _warn(self, why: str) -> None:
        if not self.warned:
            self.warned = True
            print(f"W&B's offline record {self.path} is incomplete: {why}; metrics.jsonl has every record", flush=True)


def put_aside(path: Path, *, later_than: int) -> None:
    """Move records of later steps to a new numbered file beside this one."""
    text = path.read_bytes() if path.exists() else b""
    # The last line may be incomplete after a kill.
    lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
    kept = [line for line in lines if _step(line) <= later_than]
    if len(kept) == len(lines) and path.exists() and len(text) == sum(map(len, lines)):
        return
    if aside := [line for line in lines if _step(line) > later_than]:
        numbers = itertools.count(1)
        other = next(free for number in numbers if not (free := path.with_name(f"metrics.later-{number}.jsonl")).exists())
        with writing(other) as temporary:
            temporary.write_bytes(b"".join(aside))
        print(f"{len(aside)} records of steps after {later_than} are kept in {other}", flush=True)
    with writing(path) as temporary:
        temporary.write_bytes(b"".join(kept))


def _step(line: bytes) -> float:
    """The step of a record; infinity for an invalid line, which is then moved with the later records."""
    try:
        step = float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return math.inf
    return step if math.isfinite(step) else math.inf


def _start_wandb(config: RunConfig, folder: Path, run_id: str | None) -> tuple[Any, OfflineRecord | None]:
    """The W&B run, and its offline record if it is offline."""
    mode = config.logging.wandb_mode
    if mode == "disabled":
        return None, None

    def start(mode: str) -> Any:
        import wandb

        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            print("W&B has no login (run `wandb login`, or set WANDB_API_KEY): W&B continues offline", flush=True)
            mode = "offline"
        return wandb.init(
            project=config.logging.wandb_project,
            entity=config.logging.wandb_entity,
            name=config.run.name[:128],  # the limit of W&B
            group=config.logging.wandb_group,
            dir=str(folder.absolute()),  # W&B's process may have another working directory
            id=run_id,
            resume="allow" if run_id else None,
            config=describe(config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb_settings(),
        )

    # SIGUSR1, the request to save and stop, may reach every process of a job, as with Slurm. It would end W&B's process
    # before the last records.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                run = start(attempt)
                return run, OfflineRecord(Path(run.settings.sync_file)) if run.offline else None
            except Exception as error:  # no network, login or server
                print(f"W&B could not start {attempt} ({error})", flush=True)
        print("W&B has no record of this run; metrics.jsonl has every record", flush=True)
        return None, None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def format_line(step: int, steps: int, values: dict[str, float], eta_seconds: float) -> str:
    """The console line of one record."""
    auxiliary = " ".join(
        f"{name.removeprefix('aux/').removesuffix('_loss')} {value:.3f}"
        for name, value in values.items()
        if name.startswith("aux/")
    )
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {values['train/loss']:.4f}",
        auxiliary,
        f"grad {values['train/grad_norm']:.2f}",
        f"lr {values['train/learning_rate']:.2e}",
        f"{values['speed/tokens_per_second']:,.0f} tok/s",
        f"{values['speed/flops_per_second'] / 1e9:,.1f} GFLOP/s",
        f"{values['memory/peak_gib']:.2f} GiB",
        f"ETA {clock(eta_seconds)}",
    ]
    return " | ".join(part for part in parts if part)
