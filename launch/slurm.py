"""Submit a run to Slurm: one that saves, queues itself again and resumes until it is complete.

    python -m launch.slurm model=mone_2p8b parallel.expert=8 launch.nodes=8 launch.gpus_per_node=8 launch.time=24:00:00
    python -m launch.slurm ... --dry-run          # only print the job script

The configuration is composed and checked for that many processes before anything is queued; it and the code then lie in
`launch/` of the run folder, and each start of the job runs just them.
"""

import re
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from configs.console import ReportedError, UserError, reporting_errors
from data_prep.files import writing
from mone_model.config import check
from train.config import RunConfig, describe
from train.pretrain import commit, prepare

PACKAGES = ("configs", "data_prep", "launch", "mone_model", "train")
TIME = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?)|(?P<parts>\d+(?::\d+){0,2})")
FROZEN = """# Composed and checked by launch.slurm; the job runs exactly this. Code: ./code, commit {commit}.
defaults:
  - run_config
  - _self_
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
hydra:
  run:
    dir: .
  output_subdir: null
{config}"""


@dataclass
class LaunchSection:
    """What is asked of Slurm."""

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
    """Environment variables of the training processes, e.g. +launch.environment.NCCL_SOCKET_IFNAME=eth0."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash for the job script, as they are, before the training starts, e.g. 'launch.setup=["ulimit -n 65536"]'."""
    sbatch: list[str] = field(default_factory=list)
    """More options for sbatch, e.g. '[--exclusive, --reservation=mine]'."""
    python: str = sys.executable
    """The interpreter on the nodes."""
    dry_run: bool = False
    """Only print the job script, as --dry-run does."""

    def __post_init__(self) -> None:
        for name in ("nodes", "save_seconds"):
            check(getattr(self, name) >= 1, f"launch.{name}", getattr(self, name), "must be at least 1")
        for name in ("gpus_per_node", "max_requeues", "max_restarts"):
            check(getattr(self, name) >= 0, f"launch.{name}", getattr(self, name), "must not be negative")
        processes = self.processes_per_node
        check(processes is None or processes >= 1, "launch.processes_per_node", processes, "must be null or at least 1")
        check(
            self.gpus_per_node > 0 or processes is not None,
            "launch.gpus_per_node",
            self.gpus_per_node,
            "without GPUs say how many processes: launch.processes_per_node",
        )
        check(
            TIME.fullmatch(self.time) is not None,
            "launch.time",
            self.time,
            "must be as Slurm writes it: HH:MM:SS or D-HH:MM:SS",
        )
        check(
            self.save_seconds < self.seconds,
            "launch.save_seconds",
            self.save_seconds,
            f"leaves no time for training within launch.time={self.time} ({self.seconds} seconds)",
        )
        for name, value in self.environment.items():
            check(name.isidentifier(), "launch.environment", name, "is no name of an environment variable")
            check("\n" not in value, "launch.environment", name, "must be of one line")

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


@dataclass
class SlurmConfig(RunConfig):
    """A run, and what is asked of Slurm."""

    launch: LaunchSection = field(default_factory=LaunchSection)


ConfigStore.instance().store(name="slurm_config", node=SlurmConfig)


class NotSubmitted(ReportedError):
    """Slurm did not take the job."""


class _JobScript(string.Template):
    """The template's placeholders begin with @, since $ is bash's."""

    delimiter = "@"


@hydra.main(version_base="1.3", config_path="pkg://configs", config_name="slurm")
@reporting_errors
def _submit(hydra_config: DictConfig) -> None:
    try:
        launch = OmegaConf.to_object(hydra_config.launch)
        assert isinstance(launch, LaunchSection)
        on_gpus = launch.gpus_per_node > 0 and hydra_config.compute.transformer_impl != "local"
        config, _, _ = prepare(hydra_config, launch.world_size, transformer_engine=on_gpus)
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(config, SlurmConfig)
    script = job_script(config)
    if launch.dry_run:
        print(script, end="")
        return
    folder = Path(config.run.dir) / "launch"
    if active := active_job(folder):
        raise UserError(f"run.dir={config.run.dir}: job {active} works there or waits to; `scancel {active}` ends it")
    freeze(config, script)
    submitted = subprocess.run(["sbatch", "--parsable", str(folder / "job.sh")], capture_output=True, text=True)
    if submitted.returncode != 0:
        raise NotSubmitted(f"sbatch: {submitted.stderr.strip()} ({folder / 'job.sh'} is what it was given)")
    job = submitted.stdout.strip().split(";")[0]
    with writing(folder / "job") as temporary:
        temporary.write_text(job + "\n")
    print(f"job {job}: {launch.world_size} processes on {launch.nodes} nodes")
    print(f"  {folder}/log.txt    what it prints, all its starts one after another")
    print(f"  python -m launch.status {config.run.dir}")


def main() -> None:
    """Submit the composed configuration; exit code 2 for what is refused before, 1 for what Slurm refuses."""
    sys.argv = ["launch.dry_run=true" if argument == "--dry-run" else argument for argument in sys.argv]
    _submit()


def job_script(config: SlurmConfig) -> str:
    """The bash script of the job, every value quoted."""
    launch, folder = config.launch, Path(config.run.dir).absolute() / "launch"
    options = {
        "job-name": config.run.name,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": launch.gpus_per_node or None,
        "cpus-per-task": launch.cpus_per_node,
        "mem": launch.memory_per_node,
        "time": launch.time,
        "signal": f"B:USR1@{launch.save_seconds}",
        "open-mode": "append",
        # A percent sign stands for something else there.
        "output": str(folder / "log.txt").replace("%", "%%"),
        "chdir": str(Path.cwd()),
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None] + ["--requeue", *launch.sbatch]
    environment = [f"module load {shlex.quote(module)}" for module in launch.modules]
    environment += [f"export {name}={shlex.quote(value)}" for name, value in launch.environment.items()]
    container = []
    if launch.container is not None:
        mounts = [*launch.container_mounts, f"{folder.parent}:{folder.parent}"]
        container = [f"--container-image={launch.container}", f"--container-mounts={','.join(mounts)}"]
        container.append(f"--container-workdir={Path.cwd()}")
    template = _JobScript((Path(__file__).parent / "templates/job.sh").read_text())
    return template.substitute(
        command=shlex.join(["python", "-m", "launch.slurm", *sys.argv[1:]]).replace("\n", " "),
        sbatch="\n".join(f"#SBATCH {_quoted(line)}" for line in lines),
        frozen=shlex.quote(str(folder)),
        python=shlex.quote(launch.python),
        environment="\n".join([*environment, *launch.setup]),
        processes=launch.processes,
        restarts=launch.max_restarts,
        container=" ".join(map(shlex.quote, container)),
    )


def _quoted(option: str) -> str:
    """One option of an #SBATCH line, as sbatch reads it: a backslash protects what follows, also within quotes."""
    check("\n" not in option, "launch.sbatch", option, "every option must be of one line")
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"' if re.search(r"[\s'\"\\#]", option) else option


def freeze(config: SlurmConfig, script: str) -> None:
    """Put code, configuration and job script into the run folder.

    UserError if it cannot be written.
    """
    folder = Path(config.run.dir) / "launch"
    described = describe(config)
    launch = described.pop("launch")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "code", ignore_errors=True)
        here = Path(__file__).parent.parent
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(here / package, folder / "code" / package, ignore=ignored)
        (folder / "code/COMMIT").write_text(f"{commit()}\n")
        files = {
            "frozen.yaml": FROZEN.format(commit=commit(), config=OmegaConf.to_yaml(described)),
            "launch.yaml": OmegaConf.to_yaml(launch),
            "job.sh": script,
        }
        for name, text in files.items():
            with writing(folder / name) as temporary:
                temporary.write_text(text)
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir}: cannot be written ({error}); give another run.dir") from error


def active_job(folder: Path) -> str | None:
    """The job of this run that Slurm still knows of as waiting or running."""
    path = folder / "job"
    if not path.exists():
        return None
    job = path.read_text().strip()
    shown = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format=%T"], capture_output=True, text=True)
    return job if shown.stdout.strip() else None


if __name__ == "__main__":
    main()
