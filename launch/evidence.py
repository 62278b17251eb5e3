"""Trains the recorded experiments and reports on them.

    python -m launch.evidence train=true jobs=2         # trains what has no record yet; continues after an interruption
    python -m launch.evidence                           # tables and figures from the records

The plan is configs/evidence.yaml. Each run trains on one core, scores the held-out documents, and leaves a record in
docs/evidence/runs (`launch.recorded`).
"""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from launch.evidence_page import losses_of, read_records, update_page
from launch.experiments import TRAINED, Plan, Planned, due, runs_of, source_of, waiting_for
from launch.local_queue import last_error
from launch.recorded import write_record
from launch.results import read_runs
from mone_common.console import ReportedError, UserError, command, to_dataclass
from mone_common.run_records import last_step, read_metrics, read_status
from mone_common.text import clock

PROGRESS_SECONDS = 60.0


@dataclass
class EvidenceConfig(Plan):
    """Options of `python -m launch.evidence`; those of the plan are in configs/evidence.yaml."""

    train: bool = False
    """Train the runs that have no record."""
    only: list[str] = field(default_factory=list)
    """Names of the experiments; empty: all."""
    jobs: int = 1
    """Runs that train at the same time, each on its own core."""
    records: str = "docs/evidence/runs"
    """Folder of the records."""
    page: str = "docs/evidence.md"
    """Page with the tables."""
    readme: str | None = "README.md"
    """File that has the headline, too; null: none."""
    runs: str = "runs/evidence"
    """Folder of the runs."""
    text: str = "data/evidence/shards/*"
    """Text whose held-out documents are scored."""
    evaluate: list[str] = field(default_factory=lambda: ["stride=256"])
    """Options of mone-evaluate for all runs."""
    calibrate: list[str] = field(default_factory=lambda: ["sequences=512"])
    """Options of mone-calibrate for all runs."""
    overrides: list[str] = field(default_factory=lambda: ["experiment=evidence/common"])
    """Options of mone-pretrain for all runs; those of experiments and points come after them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.only if name not in self.experiments]:
            raise UserError(f"only={self.only}: there is no {', '.join(unknown)}; choose from {', '.join(self.experiments)}")
        cores = len(os.sched_getaffinity(0))
        if not 1 <= self.jobs <= cores:
            raise UserError(f"jobs={self.jobs}: must be from 1 to the number of cores, {cores}")

    @property
    def chosen(self) -> list[str]:
        """Names of the experiments."""
        return self.only or list(self.experiments)


ConfigStore.instance().store(name="evidence_schema", node=EvidenceConfig)


@command("evidence")
def main(hydra_config: DictConfig) -> None:
    """Train or report; exit code 1 if a run fails."""
    options = to_dataclass(hydra_config, EvidenceConfig)
    if options.train:
        _Trainer(options).train()
        return
    try:
        readme = None if options.readme is None else Path(options.readme)
        update_page(options, Path(options.records), Path(options.page), readme=readme)
    except OSError as error:
        raise UserError(str(error)) from error
    print(f"{options.page}: tables and figures of the records in {options.records}")


class _Stopped(Exception):
    """The command was asked to stop."""


class _Trainer:
    def __init__(self, options: EvidenceConfig) -> None:
        self.options = options
        self.cores: queue.Queue[int] = queue.Queue()
        for core in sorted(os.sched_getaffinity(0))[: options.jobs]:
            self.cores.put(core)
        self.stopping = threading.Event()
        self.processes: set[subprocess.Popen[bytes]] = set()

    def train(self) -> None:
        """Train until no run is due; ReportedError if one fails, after the others have ended."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        running: dict[Future[None], Planned] = {}
        problems: dict[str, str] = {}
        with ThreadPoolExecutor(self.options.jobs) as pool:
            try:
                while True:
                    losses = losses_of(self.options, read_records(Path(self.options.records)))
                    waiting = [
                        run for run in self._startable(losses) if run not in running.values() and run.name not in problems
                    ]
                    while waiting and len(running) < self.options.jobs:
                        run = waiting.pop(0)
                        running[pool.submit(self._run, run, run.name in losses)] = run
                    if not running:
                        for source, names in waiting_for(self.options, losses, self.options.chosen).items():
                            print(f"{', '.join(names)}: cannot start without a record of {source}", flush=True)
                        break
                    done, _ = wait(running, timeout=PROGRESS_SECONDS, return_when=FIRST_COMPLETED)
                    for future in done:
                        if error := future.exception():
                            name = running[future].name
                            problems[name] = f"{name}: {error}"
                            print(problems[name], file=sys.stderr, flush=True)
                        del running[future]
                    if not done:
                        self._print_progress(list(running.values()), len(waiting))
            except KeyboardInterrupt:
                self.stopping.set()
                print("stopping: the runs save; the same command continues", flush=True)
                for process in list(self.processes):
                    process.send_signal(signal.SIGTERM)
        if problems:
            raise ReportedError("\n  ".join([f"{len(problems)} runs failed", *problems.values()]))

    def _startable(self, losses: Mapping[str, float]) -> list[Planned]:
        """The runs that are due; in place of one whose source was trained on another machine, that source."""
        runs: dict[str, Planned] = {}
        for run in due(self.options, losses, self.options.chosen):
            if (name := source_of(self.options, run)) and not self._is_trained(name):
                (run,) = (found for found in runs_of(self.options, losses, name.partition("/")[0]) if found.name == name)
            runs.setdefault(run.name, run)
        return list(runs.values())

    def _is_trained(self, name: str) -> bool:
        return read_status(Path(self.options.runs) / name).get("state") == "complete"

    def _run(self, run: Planned, recorded: bool) -> None:
        folder = Path(self.options.runs) / run.name
        core, began = self.cores.get(), time.monotonic()
        try:
            overrides = [*self.options.overrides, *run.overrides(self.options)]
            overrides += [f"run.dir={folder}", f"run.name=evidence/{run.name}"]
            self._call("train.pretrain", list(map(_quoted, overrides)), folder, core)
            if not self._is_trained(run.name):
                raise ReportedError(f"did not complete ({folder}/log.txt)")
            if recorded:
                print(f"{run.name}: trained again for its checkpoint, in {clock(time.monotonic() - began)}", flush=True)
                return
            self._evaluate(run, folder, core)
            (found,) = read_runs([folder])
            write_record(found, Path(self.options.records) / f"{run.name}.json")
            loss = found.evaluations[TRAINED].nats_per_token
            print(f"{run.name}: {loss:.4f} nats per token, in {clock(time.monotonic() - began)}", flush=True)
        except _Stopped:
            return
        finally:
            self.cores.put(core)

    def _evaluate(self, run: Planned, folder: Path, core: int) -> None:
        experiment, names = self.options.experiments[run.experiment], self.options.evaluations_of(run.name)
        known: dict[str, list[str]] = {TRAINED: [], **experiment.evaluations}
        evaluations = {name: options for name, options in known.items() if name in names}
        if len(evaluations) > 1:
            for share in experiment.thresholds:
                output = folder / f"thresholds_{share:g}.json"
                if not output.exists():
                    options = [f"run={folder}", f"ratio={share:g}", f"output={output}", *self.options.calibrate]
                    self._call("train.calibrate", list(map(_quoted, options)), folder, core)
        for name, options in evaluations.items():
            output = folder / "evaluations" / f"{name}.json"
            if not output.exists():
                every = [f"model={folder}", f"text={self.options.text}", f"output={output}", *self.options.evaluate]
                own = [option.replace("{run}", str(folder)) for option in options]
                self._call("mone_eval.evaluate", list(map(_quoted, [*every, *own])), folder, core)

    def _call(self, module: str, arguments: list[str], folder: Path, core: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches only this process, which then stops the runs
            )
            self.processes.add(process)
            os.sched_setaffinity(process.pid, {core})
            code = process.wait()
            self.processes.discard(process)
            if self.stopping.is_set():
                raise _Stopped
            if code:
                log_file = folder / "log.txt"
                raise ReportedError(f"{last_error(log_file) or f'{module} ended with exit code {code}'} ({log_file})")

    def _print_progress(self, running: list[Planned], waiting: int) -> None:
        parts = []
        for run in running:
            records = read_metrics(Path(self.options.runs) / run.name)
            parts.append(f"{run.name} step {last_step(records)}{_time_left(records)}")
        print(f"{', '.join(parts)}; {waiting} more are due", flush=True)


def _time_left(records: list[dict[str, Any]]) -> str:
    speeds = [record["speed/tokens_per_second"] for record in records if "speed/tokens_per_second" in record]
    return f" ({speeds[-1]:,.0f} tokens/s)" if speeds else ""


def _quoted(option: str) -> str:
    """An option with quotes around a value that has characters with a meaning in Hydra's grammar."""
    name, _, value = option.partition("=")
    return f"{name}='{value}'" if any(character in value for character in ",=*") else option


if __name__ == "__main__":
    main()
