"""The points of a sweep: composed, checked before any of them starts, looked up, submitted.

points = plan_points(config, loader, {0: overrides}, check, 1)      # UserError names every point that cannot run
outcomes = run_points(points, options)                              # launch.local_queue: on this machine
outcomes = submit_points(points, options)                           # as Slurm jobs

A point is a run in a folder of its own, named after what was swept: runs/k_sweep/activation_ratio=0.5,seed=1. Started
again, a sweep passes over its finished points and continues the others.
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
"""Hydra's own default of hydra.sweep.subdir, in whose place a point's name stands."""
NAME_BYTES = 200
"""Of a point's name, at most: file systems take 255, and some of them less."""
LEARNED = (
    *("model.", "training.", "optimizer.", "deepspeed.", "guard.", "data.blend", "evaluation."),
    *("run.seed", "engine", "compute.precision"),
)
"""Options, by the beginning of their names, that what a run learns and reports depends on."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """What was swept and its values here: activation_ratio=0.5,seed=1."""
    overrides: tuple[str, ...]
    config: RunConfig
    finished: bool
    """Whether its folder holds this run, complete."""

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Outcome:
    """What came of a point."""

    state: str
    """complete, stopped (in good order, to be continued), failed, submitted, or not submitted (a dry run)."""
    reason: str
    """Of what failed, in words; else what there is to say."""
    validation_loss: float | None = None


def plan_points(
    master: DictConfig,
    loader: ConfigLoader,
    jobs: Mapping[int, Sequence[str]],
    check: Callable[[DictConfig, int], RunConfig],
    processes: int,
) -> list[Point]:
    """The points of these jobs, by number, each with its overrides; UserError if one cannot run, before any has begun.

    check: a composed configuration's typed form, for that many processes; raises ValueError for what is wrong.
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
                    f"{len(problems)} of {len(jobs)} points cannot run on {processes} processes each; none was started",
                    *problems,
                ]
            )
        )
    folders = [point.folder for point in points]
    if twice := sorted({str(folder) for folder in folders if folders.count(folder) > 1}):
        raise UserError(f"hydra.sweep: several points would share {', '.join(twice)}; give each a hydra.sweep.subdir")
    return points


def submit_points(points: Sequence[Point], options: SlurmOptions) -> list[Outcome]:
    """Submit a job for each point that is neither finished nor already with Slurm."""
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
    """Of a point that was complete before."""
    return Outcome("complete", "finished before", validation_loss(point.folder))


def validation_loss(folder: Path) -> float | None:
    """The last one on record."""
    return last_value(read_metrics(folder), "validation/loss")


def _finished(config: RunConfig) -> bool:
    """Whether the run folder holds this run, complete; ValueError if it holds one of other options."""
    folder = Path(config.run.dir)
    ours, saved = flat(describe(config)), read_config(folder)
    changed = [name for name in ours if name.startswith(LEARNED) and saved.get(name, ours[name]) != ours[name]]
    if changed:
        raise ValueError(
            f"{folder} holds a run of other options: "
            f"{', '.join(f'{name}={saved[name]} (now {ours[name]})' for name in changed)}; "
            "restore them, give another run.name, or move it away"
        )
    return read_status(folder).get("state") == "complete"


def busy(point: Point) -> Outcome | None:
    """That somebody trains in the point's folder now, or is about to: a job of its own, or a process that is not ours."""
    # The job first: while it runs, its process is the one in the folder.
    if job := active_job(point.folder / "launch"):
        return Outcome("submitted", f"job {job} works there or waits to")
    return Outcome("failed", f"another process trains in {point.folder} now") if in_use(point.folder) else None


def _swept_options(master: DictConfig) -> list[str]:
    """The options that are varied: those of hydra.sweeper.params, and those with several values on the command line."""
    params = master.hydra.sweeper.get("params") or {}
    given = OverridesParser.create().parse_overrides(list(master.hydra.overrides.task))
    return [*params, *(override.key_or_group for override in given if override.is_sweep_override())]


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] in "'\"" and value[0] == value[-1] else value


def _name(overrides: Sequence[str], swept: Sequence[str]) -> str:
    values = {key.lstrip("+"): _unquoted(value) for key, _, value in (override.partition("=") for override in overrides)}
    keys = [key for key in dict.fromkeys(swept) if key in values] or list(values)
    keys.sort(key=lambda key: key == "run.seed")  # behind what it repeats
    last = [key.rpartition(".")[2] for key in keys]
    short = [name if last.count(name) == 1 else key for name, key in zip(last, keys, strict=True)]
    pairs = [f"{name}={values[key]}" for name, key in zip(short, keys, strict=True)]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(pairs)) or "only"


def shorten(name: str, sweep: Path) -> str:
    """A name that a folder can have: beyond NAME_BYTES it is cut and ends in a hash, unless a run has it in full."""
    encoded = name.encode()
    if len(encoded) <= NAME_BYTES or os.path.exists(sweep / name):
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: NAME_BYTES - 13].decode(errors='ignore')}-{digest}"
