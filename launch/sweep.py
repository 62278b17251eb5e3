"""Plans the points of a sweep, checks all of them before the first one starts, and submits them to Slurm.

points = plan_points(config, loader, {0: overrides}, check, 1)      # UserError lists every invalid point
outcomes = run_points(points, options)                              # launch.local_queue: on this machine
outcomes = submit_points(points, options)                           # as Slurm jobs

A point is a run in its own folder, named after the swept options: runs/k_sweep/activation_ratio=0.5,seed=1. A sweep that is
started again skips its finished points and resumes the others.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from launch.options import SlurmOptions
from launch.slurm import active_job, job_script, submit
from mone_common.console import ReportedError, UserError
from mone_common.run_folder import check_free, in_use
from mone_common.run_records import flat, last_value, read_config, read_metrics, read_status
from train.config import RunConfig, describe
from train.config_sections import check_name

SUBDIR = "${hydra.job.num}"
"""Hydra's default of hydra.sweep.subdir; the name of the point replaces it."""
NAME_BYTES = 200
"""Longest name of a point; most file systems allow 255 bytes, some fewer."""
AFFECT_RESULTS = (
    *("model.", "training.", "optimizer.", "deepspeed.", "guard.", "data.blend", "evaluation."),
    *("run.seed", "engine", "compute.precision"),
)
"""Prefixes of options that affect the results of a run."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """The swept options and their values: activation_ratio=0.5,seed=1."""
    overrides: tuple[str, ...]
    config: RunConfig
    finished: bool
    """Whether its folder contains this run, complete."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Outcome:
    """Result of a point."""

    state: str
    """complete, stopped (saved, can continue), failed, submitted, or not submitted (a dry run)."""
    reason: str
    """Reason of a failure, else further details."""
    validation_loss: float | None = None


def plan_points(
    master: DictConfig,
    loader: ConfigLoader,
    jobs: Mapping[int, Sequence[str]],
    check: Callable[[DictConfig, int], RunConfig],
    processes: int,
) -> list[Point]:
    """The points of these jobs; UserError if one cannot run.

    jobs: overrides by job number. check: converts a composed configuration to RunConfig and checks it for a number of
    processes; raises ValueError.
    """
    swept, sweep = _swept_options(master), Path(master.hydra.sweep.dir)
    subdir = OmegaConf.to_container(master.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index,call-overload]
    check_name(master.run.name)
    check_free(sweep, sweep=True)
    points, problems = [], []
    for number, overrides in jobs.items():
        composed = loader.load_sweep_config(master, list(overrides))
        with read_write(composed), open_dict(composed):
            composed.hydra.job.id, composed.hydra.job.num = str(number), number
            HydraConfig.instance().set_config(composed)
            name = shorten(_name(overrides, swept), sweep)
            folder = sweep / (name if subdir == SUBDIR else composed.hydra.sweep.subdir)
            del composed["hydra"]
            composed.run.name, composed.run.dir = f"{sweep.name}/{name}", str(folder)
            composed.logging.wandb_group = composed.logging.wandb_group or sweep.name
        try:
            config = check(composed, processes)
            points.append(Point(name, tuple(overrides), config, _finished(config)))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise UserError(
            "\n  ".join(
                [
                    f"{len(problems)} of {len(jobs)} points cannot run on {processes} processes each; no point was started",
                    *problems,
                ]
            )
        )
    folders = [point.folder for point in points]
    if twice := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise UserError(
            f"hydra.sweep: several points have the folder {', '.join(twice)}; give each its own hydra.sweep.subdir"
        )
    return points


def submit_points(points: Sequence[Point], options: SlurmOptions) -> list[Outcome]:
    """Submit a job for each point that is not finished and has no active job."""
    outcomes = []
    for point in points:
        outcomes.append(_submit(point, options))
        if not options.dry_run:
            print(f"{point.name}: {outcomes[-1].state}, {outcomes[-1].reason}", flush=True)
    return outcomes


def _submit(point: Point, options: SlurmOptions) -> Outcome:
    if options.dry_run:
        print(job_script(point.config, options), end="")
        return Outcome("not submitted", "dry run")
    if point.finished:
        return finished(point)
    try:
        return busy(point) or Outcome("submitted", f"job {submit(point.config, options)}")
    except ReportedError as error:
        return Outcome("failed", str(error))


def finished(point: Point) -> Outcome:
    """Outcome of a point that an earlier start completed."""
    return Outcome("complete", "finished before", validation_loss(point.folder))


def validation_loss(folder: Path) -> float | None:
    """The last recorded validation loss."""
    return last_value(read_metrics(folder), "validation/loss")


def _finished(config: RunConfig) -> bool:
    """Whether the run folder contains this run, complete; ValueError if it contains a run with other options."""
    folder = Path(config.run.dir)
    ours, saved = flat(describe(config)), read_config(folder)
    changed = [name for name in ours if name.startswith(AFFECT_RESULTS) and saved.get(name, ours[name]) != ours[name]]
    if changed:
        raise ValueError(
            f"{folder} contains a run with other options: "
            f"{', '.join(f'{name}={saved[name]} (now {ours[name]})' for name in changed)}; "
            "restore them, set another run.name, or move the folder away"
        )
    return read_status(folder).get("state") == "complete"


def busy(point: Point) -> Outcome | None:
    """The outcome of a point whose folder a job or another process is using, else None."""
    # The job comes first: while it runs, the process in the folder is its own.
    if job := active_job(point.folder / "launch"):
        return Outcome("submitted", f"job {job} is queued or running there")
    return Outcome("failed", f"another process is training in {point.folder}") if in_use(point.folder) else None


def _swept_options(master: DictConfig) -> list[str]:
    """The swept options: those of hydra.sweeper.params, and those with several values on the command line."""
    params = master.hydra.sweeper.get("params") or {}
    given = OverridesParser.create().parse_overrides(list(master.hydra.overrides.task))
    return [*params, *(override.key_or_group for override in given if override.is_sweep_override())]


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] in "'\"" and value[0] == value[-1] else value


def _name(overrides: Sequence[str], swept: Sequence[str]) -> str:
    values = {key.lstrip("+"): _unquoted(value) for key, _, value in (override.partition("=") for override in overrides)}
    keys = [key for key in dict.fromkeys(swept) if key in values] or list(values)
    keys.sort(key=lambda key: key == "run.seed")  # the seed comes last
    last = [key.rpartition(".")[2] for key in keys]
    short = [name if last.count(name) == 1 else key for name, key in zip(last, keys, strict=True)]
    pairs = [f"{name}={values[key]}" for name, key in zip(short, keys, strict=True)]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(pairs)) or "only"


def shorten(name: str, sweep: Path) -> str:
    """A valid folder name: a longer name than NAME_BYTES is truncated and gets a hash, unless its folder exists."""
    encoded = name.encode()
    if len(encoded) <= NAME_BYTES or os.path.exists(sweep / name):
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: NAME_BYTES - 13].decode(errors='ignore')}-{digest}"
