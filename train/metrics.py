"""Where numbers go: a JSONL file, W&B, and one line on the console. Names: docs/metrics.md.

    writer = MetricsWriter(config, folder, resume_step=200, wandb_id=None)     # on rank 0
    writer.write(step, {"train/loss": 3.2, ...})
    writer.write_figure(step, "neuron_use", path)
    writer.close()

A missing W&B server or login never stops a run: it goes on offline, and the JSONL file has everything.
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
from train.config import RunConfig, describe

if TYPE_CHECKING:
    import torch

TIMEOUTS = {"init_timeout": 20.0, "finish_timeout": 60.0}
"""Seconds that W&B may take to start, and for what is not uploaded at the end; `wandb sync` uploads the rest. What
WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT say comes first."""


ROOM = 2**16
"""Bytes; W&B writes 32 KiB at a time."""


class MetricsWriter:
    """Writes records of named numbers, one a step; after a resume it first puts records of later steps aside."""

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
        # JSON has no word for what is undefined, such as the overlap among fewer than two experts.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.unwritten += (json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n").encode()
        self._flush()
        self._to_wandb(step, lambda wandb: values)

    def write_figure(self, step: int, name: str, path: Path) -> None:
        """Show an image file in W&B; it already lies in the run folder."""
        self._to_wandb(step, lambda wandb: {f"figure/{name}": wandb.Image(str(path))})

    def write_histograms(self, step: int, values: dict[str, "torch.Tensor"]) -> None:
        """Show distributions in W&B."""
        self._to_wandb(
            step,
            lambda wandb: {name: wandb.Histogram(tensor.flatten().numpy()) for name, tensor in values.items()},
        )

    def _flush(self) -> None:
        """Write what is not written yet. A full disk does not stop the run: it is tried again with the next record."""
        try:
            while self.unwritten:
                written = self.file.write(self.unwritten)  # as much as there is room for
                self.unwritten = self.unwritten[written:]
        except OSError as error:
            print(f"{self.path}: {error}; records wait in memory until there is room", flush=True)

    def _to_wandb(self, step: int, make: Callable[[Any], dict[str, Any]]) -> None:
        """Log what `make` makes of the wandb module."""
        if self.wandb is None:
            return
        import wandb

        try:
            if self.record is not None:
                self.record.check_room()
            self.wandb.log(make(wandb), step=step)
        except Exception as error:  # whatever W&B raises, training is worth more
            print(f"W&B stopped taking records ({error}); the run goes on with {self.path}", flush=True)
            self.wandb = None
            with contextlib.suppress(Exception, SystemExit):  # else it would complain again when this process ends
                wandb.teardown()

    def close(self) -> None:
        """Finish the files."""
        self._flush()
        self.file.close()
        if self.wandb is not None:
            try:
                before = self.record.size() if self.record is not None else 0
                self.wandb.finish()
                if self.record is not None:
                    self.record.check_end(before)
            except Exception as error:  # the run is complete without it
                print(f"W&B did not finish ({error})", flush=True)


class OfflineRecord:
    """The file that W&B writes for `wandb sync`; on a full disk W&B leaves out the rest of it silently."""

    def __init__(self, path: Path) -> None:
        self.path, self.told = path, False

    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size

    def check_room(self) -> None:
        """Tell, once, that the disk has no room for the next record."""
        if shutil.disk_usage(self.path.parent).free < ROOM:
            self._tell("the disk is full")

    def check_end(self, before: int) -> None:
        """Tell, once, if the last records did not come; before: the size before W&B finished the file."""
        if self.size() <= before:
            self._tell("its end is missing")

    def _tell(self, why: str) -> None:
        if not self.told:
            self.told = True
            print(f"W&B's offline record {self.path} is incomplete: {why}; metrics.jsonl has every record", flush=True)


def put_aside(path: Path, *, later_than: int) -> None:
    """Move the records of later steps than this into a numbered file beside the others; nothing is lost."""
    text = path.read_bytes() if path.exists() else b""
    # What a kill has cut short is no record.
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
    """Of a record; of a line that is none, infinity: it is put aside with the later ones."""
    try:
        step = float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return math.inf
    return step if math.isfinite(step) else math.inf


def wandb_settings() -> Any:
    """How W&B is used: without words, and never waited for long.

    Without a limit a server that went away holds the processors of a finished run for as long as it is retried.
    """
    import wandb

    known = wandb.Settings.model_fields
    ours = {name: value for name, value in TIMEOUTS.items() if name in known and f"WANDB_{name.upper()}" not in os.environ}
    return wandb.Settings(silent=True, **ours)


def _start_wandb(config: RunConfig, folder: Path, run_id: str | None) -> tuple[Any, OfflineRecord | None]:
    """The W&B run, and its record if it is offline."""
    mode = config.logging.wandb_mode
    if mode == "disabled":
        return None, None

    def start(mode: str) -> Any:
        import wandb

        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            print("W&B has no login (run `wandb login`, or set WANDB_API_KEY): the run goes on offline", flush=True)
            mode = "offline"
        return wandb.init(
            project=config.logging.wandb_project,
            entity=config.logging.wandb_entity,
            name=config.run.name[:128],  # as much as W&B takes
            group=config.logging.wandb_group,
            dir=str(folder.absolute()),  # W&B's process may have another working directory
            id=run_id,
            resume="allow" if run_id else None,
            config=describe(config),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb_settings(),
        )

    # A request to save and stop may reach every process of a job, as Slurm's do. W&B's would end by it at once, before it
    # has the last records; SIGTERM it heeds in any case.
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        for attempt in dict.fromkeys([mode, "offline"]):
            try:
                run = start(attempt)
                return run, OfflineRecord(Path(run.settings.sync_file)) if run.offline else None
            except Exception as error:  # no network, no login, no server: the run goes on
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
