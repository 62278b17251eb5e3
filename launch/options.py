"""What the ways of launching are asked: the options of a local queue and of Slurm.

Imports no torch: hydra_plugins/mone_launchers.py reads this at the start of every command.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from omegaconf import DictConfig, OmegaConf

from mone_common.secrets import found_secret, is_secret, masked

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?(\w+)")
"""The interpolation that stands for a variable of the environment."""

TIME = re.compile(
    r"(?:(?P<days>[0-9]+)-(?P<h>[0-9]+)(?::(?P<m>[0-9]+)(?::(?P<s>[0-9]+))?)?)|(?P<parts>[0-9]+(?::[0-9]+){0,2})"
)


@dataclass
class LocalOptions:
    """A queue of runs on this machine."""

    jobs: int = 1
    """Runs at a time; each gets its share of the cores, or of the GPUs."""
    processes: int | None = None
    """Processes of a run; null: one for each GPU of its share, or one where there are none."""
    report_seconds: float = 60.0
    """Seconds between lines that say how far the runs are."""

    def __post_init__(self) -> None:
        from mone_common.checks import check

        check(self.jobs >= 1, "hydra.launcher.jobs", self.jobs, "must be at least 1")
        processes = self.processes
        check(processes is None or processes >= 1, "hydra.launcher.processes", processes, "must be null or at least 1")
        check(self.report_seconds > 0, "hydra.launcher.report_seconds", self.report_seconds, "must be positive")


@dataclass
class SlurmOptions:
    """What is asked of Slurm."""

    section: ClassVar[str] = "launch"
    """Under which name users give these options."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs on each, and processes; 0 on a cluster without GPUs."""
    processes_per_node: int | None = None
    """Processes on each machine; null: one for each GPU."""
    cpus_per_node: int | None = None
    """Cores on each machine for the job; null: what the cluster gives."""
    memory_per_node: str | None = None
    """Host memory on each machine, e.g. 500G, or 0 for all of it; null: what the cluster gives."""
    time: str = "24:00:00"
    """Time limit of one start, as Slurm writes it; the job queues itself again before it."""
    save_seconds: int = 300
    """How long before the time limit the run saves and leaves: several times what a step and a checkpoint take."""
    max_requeues: int = 50
    """How often the job queues itself again, at most."""
    max_restarts: int = 1
    """How often crashed processes are started again within the job; after that the job is queued again."""
    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features of nodes, e.g. 'h100&ib'."""
    container: str | None = None
    """Container image, started by the pyxis plugin; it must have Python and our dependencies."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders that the container sees, as SOURCE:TARGET; add those of the runs and of the data."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the training processes, like launch.environment.NAME=value. No secrets: the job script is
    a plain file; name them in pass_environment."""
    pass_environment: list[str] = field(default_factory=list)
    """Variables of the submitting environment that the job needs, by name, e.g. '[WANDB_API_KEY]'. sbatch hands on all of
    them; a job without one of these is not submitted, or ends at once. Their values are written nowhere."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash for the job script, as they are, before the training starts, e.g. '["ulimit -n 65536"]'."""
    sbatch: list[str] = field(default_factory=list)
    """More options for sbatch, e.g. '[--exclusive, --reservation=mine]'."""
    python: str = sys.executable
    """The interpreter on the nodes."""
    dry_run: bool = False
    """Only print the job script, as --dry-run does."""

    def __post_init__(self) -> None:
        from mone_common.checks import check

        for name in ("nodes", "save_seconds"):
            check(getattr(self, name) >= 1, f"{self.section}.{name}", getattr(self, name), "must be at least 1")
        for name in ("gpus_per_node", "max_requeues", "max_restarts"):
            check(getattr(self, name) >= 0, f"{self.section}.{name}", getattr(self, name), "must not be negative")
        cores, processes = self.cpus_per_node, self.processes_per_node
        check(cores is None or cores >= 1, f"{self.section}.cpus_per_node", cores, "must be null or at least 1")
        check(self.python.strip() != "", f"{self.section}.python", repr(self.python), "must be the path of an interpreter")
        check(
            processes is None or processes >= 1,
            f"{self.section}.processes_per_node",
            processes,
            "must be null or at least 1",
        )
        check(
            self.gpus_per_node > 0 or processes is not None,
            f"{self.section}.gpus_per_node",
            self.gpus_per_node,
            f"without GPUs say how many processes: {self.section}.processes_per_node",
        )
        check(
            TIME.fullmatch(self.time) is not None,
            f"{self.section}.time",
            self.time,
            "must be as Slurm writes it: HH:MM:SS or D-HH:MM:SS",
        )
        check(
            self.save_seconds < self.seconds,
            f"{self.section}.save_seconds",
            self.save_seconds,
            f"leaves no time for training within {self.section}.time={self.time} ({self.seconds} seconds)",
        )
        for option in ("environment", "pass_environment"):
            for name in getattr(self, option):
                known = VARIABLE.fullmatch(name) is not None
                check(known, f"{self.section}.{option}", repr(masked(name)), "is no name of an environment variable")
        for line in self.sbatch:
            check(line.startswith("-"), f"{self.section}.sbatch", repr(masked(line)), "every option of sbatch begins with -")
        for option, value in self._texts():
            # Values are not printed: they may be secret.
            if not value.isprintable():
                raise ValueError(f"{option}: has a line break or another control character, which no job script may hold")
            name = option.rpartition(".")[2] if option.startswith(f"{self.section}.environment.") else ""
            if secret := name if is_secret(name) else found_secret(value):
                raise ValueError(_secret_told(self.section, option, secret))

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Every text among the options, which a job script may hold, with the option's name."""
        for each in fields(self):
            value = getattr(self, each.name)
            texts = value if isinstance(value, dict | list) else [value]
            for key in texts:
                text = value[key] if isinstance(value, dict) else key
                if isinstance(text, str):
                    yield f"{self.section}.{each.name}" + (f".{key}" if isinstance(value, dict) else ""), text

    @property
    def seconds(self) -> int:
        """`time` in seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
        match = TIME.fullmatch(self.time)
        assert match is not None
        if match["parts"] is None:
            days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "h", "m", "s"))
            return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
        parts = [int(part) for part in match["parts"].split(":")]
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
        return (hours * 60 + minutes) * 60 + seconds

    @property
    def processes(self) -> int:
        """Processes on each machine."""
        return self.processes_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.processes


def read_slurm_options(node: DictConfig) -> SlurmOptions:
    """The typed options; ValueError if one is wrong, or takes a secret from the environment into the job script."""
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(node, resolve=False))]
    options = OmegaConf.to_object(node)
    assert isinstance(options, SlurmOptions)
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else ((None, each) for each in value)
            pending += [(name if key is None else f"{name}.{key}", each) for key, each in inner]
        elif secret := next(filter(is_secret, FROM_ENVIRONMENT.findall(str(value))), None):
            raise ValueError(_secret_told(options.section, f"{options.section}{name}", secret))
    return options


def _secret_told(section: str, option: str, secret: str) -> str:
    return (
        f"{option}: {secret} would stand in the job script, for others to read; set it in the environment that "
        f"submits, and name the variable: '{section}.pass_environment=[NAME]'"
    )


def stored(kind: type[object], environment: str) -> DictConfig:
    """The options of a dataclass for Hydra's store; the mapping at `environment` takes new names without a plus."""
    node = OmegaConf.structured(kind)
    assert isinstance(node, DictConfig)
    OmegaConf.set_struct(OmegaConf.select(node, environment), False)
    return node
