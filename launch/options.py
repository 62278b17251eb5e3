"""Options of the local queue and of Slurm.

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
"""An OmegaConf interpolation that reads an environment variable."""

TIME = re.compile(
    r"(?:(?P<days>[0-9]+)-(?P<h>[0-9]+)(?::(?P<m>[0-9]+)(?::(?P<s>[0-9]+))?)?)|(?P<parts>[0-9]+(?::[0-9]+){0,2})"
)


@dataclass
class LocalOptions:
    """A queue of runs on this machine."""

    jobs: int = 1
    """Concurrent runs; each gets an equal share of the cores and GPUs."""
    processes: int | None = None
    """Processes of a run; null: one for each GPU of its share, or one without GPUs."""
    report_seconds: float = 60.0
    """Seconds between progress lines."""

    def __post_init__(self) -> None:
        from mone_common.checks import check

        check(self.jobs >= 1, "hydra.launcher.jobs", self.jobs, "must be at least 1")
        processes = self.processes
        check(processes is None or processes >= 1, "hydra.launcher.processes", processes, "must be null or at least 1")
        check(self.report_seconds > 0, "hydra.launcher.report_seconds", self.report_seconds, "must be positive")


@dataclass
class SlurmOptions:
    """Options of a Slurm job."""

    section: ClassVar[str] = "launch"
    """Prefix of these options on the command line."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs on each machine; 0 on a cluster without GPUs."""
    processes_per_node: int | None = None
    """Processes on each machine; null: one for each GPU."""
    cpus_per_node: int | None = None
    """Cores on each machine; null: the cluster's default."""
    memory_per_node: str | None = None
    """Host memory on each machine, e.g. 500G, or 0 for all of it; null: the cluster's default."""
    time: str = "24:00:00"
    """Time limit of one start, in Slurm's format; the job requeues itself before it."""
    save_seconds: int = 300
    """Seconds before the time limit at which the run saves and exits; allow several times a step plus a checkpoint."""
    max_requeues: int = 50
    """How often the job may requeue itself."""
    max_restarts: int = 1
    """How often crashed processes are restarted within the job; after that the job is requeued."""
    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account to charge; null: your default."""
    qos: str | None = None
    """Quality of service; null: the cluster's default."""
    constraint: str | None = None
    """Required features of nodes, e.g. 'h100&ib'."""
    container: str | None = None
    """Container image for the pyxis plugin; it must contain Python and the dependencies."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders to mount in the container, as SOURCE:TARGET; the folder of the run is always mounted."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the training processes, e.g. launch.environment.NAME=value. They are written to the job
    script: put secrets into pass_environment instead."""
    pass_environment: list[str] = field(default_factory=list)
    """Names of variables that the job needs from the submitting environment, e.g. '[WANDB_API_KEY]'. If one is not set,
    the job is not submitted, or ends at once. Their values are not written to any file."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that the job script runs before training, e.g. '["ulimit -n 65536"]'."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, e.g. '[--exclusive, --reservation=mine]'."""
    python: str = sys.executable
    """Path of the Python interpreter on the nodes."""
    dry_run: bool = False
    """Only print the job script; same as --dry-run."""

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
            f"without GPUs, set the number of processes: {self.section}.processes_per_node",
        )
        check(
            TIME.fullmatch(self.time) is not None,
            f"{self.section}.time",
            self.time,
            "must have Slurm's format: HH:MM:SS or D-HH:MM:SS",
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
                check(known, f"{self.section}.{option}", repr(masked(name)), "is not a name of an environment variable")
        for line in self.sbatch:
            check(
                line.startswith("-"),
                f"{self.section}.sbatch",
                repr(masked(line)),
                "must be an option of sbatch, which begins with -",
            )
        for option, value in self._texts():
            # The messages do not contain the value, which may be a secret.
            if not value.isprintable():
                raise ValueError(f"{option}: contains a line break or another control character; remove it")
            name = option.rpartition(".")[2] if option.startswith(f"{self.section}.environment.") else ""
            if secret := name if is_secret(name) else found_secret(value):
                raise ValueError(_secret_message(self.section, option, secret))

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Name and value of every string among the options; the job script may contain it."""
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
    """The typed options; ValueError if one is invalid or would copy a secret from the environment into the job script."""
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(node, resolve=False))]
    options = OmegaConf.to_object(node)
    assert isinstance(options, SlurmOptions)
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else ((None, each) for each in value)
            pending += [(name if key is None else f"{name}.{key}", each) for key, each in inner]
        elif secret := next(filter(is_secret, FROM_ENVIRONMENT.findall(str(value))), None):
            raise ValueError(_secret_message(options.section, f"{options.section}{name}", secret))
    return options


def _secret_message(section: str, option: str, secret: str) -> str:
    return (
        f"{option}: {secret} would be written to the job script, which others can read; set it in the submitting "
        f"environment and pass its name: '{section}.pass_environment=[NAME]'"
    )


def stored(kind: type[object], environment: str) -> DictConfig:
    """The options of a dataclass for Hydra's store; users can add keys to the mapping `environment` without a plus."""
    node = OmegaConf.structured(kind)
    assert isinstance(node, DictConfig)
    OmegaConf.set_struct(OmegaConf.select(node, environment), False)
    return node
