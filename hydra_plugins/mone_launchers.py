"""Hydra launchers and sweeper for `--multirun`: hydra/launcher=local (the default of mone-pretrain) or slurm.

Hydra searches plugins in this namespace only. It imports this module at the start of every command, so imports at module
level must be cheap.
"""

import os
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from launch.options import LocalOptions, SlurmOptions, read_slurm_options, stored
from mone_common.console import ReportedError, UserError, reporting_errors

if TYPE_CHECKING:
    from launch.sweep import Outcome, Point
    from train.config import RunConfig


@dataclass
class LocalLauncherConfig(LocalOptions):
    """Options of hydra/launcher=local."""

    _target_: str = "hydra_plugins.mone_launchers.LocalLauncher"


@dataclass
class SlurmLauncherConfig(SlurmOptions):
    """Options of hydra/launcher=slurm."""

    section: ClassVar[str] = "hydra.launcher"

    _target_: str = "hydra_plugins.mone_launchers.SlurmLauncher"


@dataclass
class SweeperConfig(BasicSweeperConf):
    """Options of hydra/sweeper=basic, the default; replaces Hydra's sweeper of that name."""

    _target_: str = "hydra_plugins.mone_launchers.Combinations"
    params: dict[str, str] = field(default_factory=dict)  # not null: OmegaConf cannot merge keys with dots into null


ConfigStore.instance().store(group="hydra/sweeper", name="basic", node=SweeperConfig)
ConfigStore.instance().store(group="hydra/launcher", name="local", node=LocalLauncherConfig)
ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=stored(SlurmLauncherConfig, "environment"))


class Combinations(BasicSweeper):
    """Runs all combinations of values like Hydra's BasicSweeper, but does not write multirun.yaml.

    Hydra writes that file before the launcher checks the sweep, so an invalid sweep or a dry run would leave it behind.
    """

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Results of all points, one list for each batch."""
        assert self.hydra_context is not None
        assert self.launcher is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        self.overrides = self.split_arguments(overrides, self.max_batch_size)
        returns: list[Sequence[JobReturn]] = []
        while not self.is_done():
            returns.append(self.launcher.launch(self.get_job_batch(), initial_job_idx=sum(map(len, returns))))
            for job in returns[-1]:
                _ = job.return_value  # raises the error of a failed job
        return returns


class _SweepLauncher(Launcher):
    """Plans all points, starts them, and returns their results to Hydra's sweeper."""

    def __init__(self, **options: Any) -> None:
        """Ignore `options`: `launch` reads them from the configuration, where they are typed."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.master = hydra_context.config_loader, config

    @reporting_errors
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """The result of each job: its validation loss, for sweepers that optimise it, or its error."""
        if "RANK" in os.environ:
            raise UserError("--multirun: start it without torchrun; hydra.launcher.processes=N gives each run N processes")
        try:
            options = self.read_options(self.master.hydra.launcher)
            points, outcomes = self.run(options, dict(enumerate(job_overrides, start=initial_job_idx)))
        except ValueError as error:
            raise UserError(str(error)) from error
        states = [outcome.state for outcome in outcomes]
        print("sweep: " + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)), flush=True)
        for point, outcome in zip(points, outcomes, strict=True):
            if outcome.state == "failed":
                print(f"  failed: {point.name}: {outcome.reason}", flush=True)
        if "submitted" in states:
            print(f"  mone-status {points[0].folder.parent}", flush=True)
        if "complete" in states:
            print(f"  mone-report {points[0].folder.parent}", flush=True)
        if "stopped" in states:
            print("  the same command continues", flush=True)
            sys.exit(0)  # do not start the sweeper's further batches
        return [
            JobReturn(
                overrides=point.overrides,
                status=JobStatus.FAILED if outcome.state == "failed" else JobStatus.COMPLETED,
                _return_value=ReportedError(f"{point.name}: {outcome.reason}")
                if outcome.state == "failed"
                else outcome.validation_loss,
            )
            for point, outcome in zip(points, outcomes, strict=True)
        ]

    def read_options(self, node: DictConfig) -> Any:
        """The launcher's typed options; ValueError if one is invalid."""
        return OmegaConf.to_object(node)

    @abstractmethod
    def run(self, options: Any, jobs: Mapping[int, Sequence[str]]) -> tuple[list["Point"], list["Outcome"]]:
        """Plan the points of these jobs and start them; ValueError if one cannot run."""


class LocalLauncher(_SweepLauncher):
    """Runs the points in a queue on this machine."""

    def run(self, options: LocalOptions, jobs: Mapping[int, Sequence[str]]) -> tuple[list["Point"], list["Outcome"]]:
        """Check all points, then run them side by side; returns when all have ended."""
        from launch.local_queue import run_points, shares
        from launch.sweep import plan_points
        from train.preparation import prepare_run

        processes = shares(options)[0].processes

        def check(config: DictConfig, number: int) -> "RunConfig":
            return prepare_run(config, number, processes="hydra.launcher.processes")[0]

        points = plan_points(self.master, self.loader, jobs, check, processes)
        return points, run_points(points, options)


class SlurmLauncher(_SweepLauncher):
    """Submits one Slurm job for each point and does not wait for them."""

    def read_options(self, node: DictConfig) -> SlurmOptions:
        """The launcher's options, typed; ValueError for a wrong one and one that takes a secret into a job script."""
        return read_slurm_options(node)

    def run(self, options: SlurmOptions, jobs: Mapping[int, Sequence[str]]) -> tuple[list["Point"], list["Outcome"]]:
        """Check all points, then submit a job for each; returns when Slurm has them."""
        from launch.slurm import check_run
        from launch.sweep import plan_points, submit_points

        points = plan_points(
            self.master, self.loader, jobs, lambda config, _: check_run(config, options), options.world_size
        )
        return points, submit_points(points, options)
