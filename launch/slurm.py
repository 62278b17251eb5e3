"""Submits a run to Slurm; the job saves, requeues itself and resumes until the run is complete.

    mone-slurm experiment=demo launch.nodes=2 launch.gpus_per_node=1 launch.time=24:00:00
    mone-slurm ... --dry-run          # only print the job script

The command first composes the configuration and checks it for the job's number of processes. It then copies configuration
and code to `launch/` of the run folder, and each start of the job runs these copies.
"""

import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from launch.frozen import freeze
from launch.options import SlurmOptions, read_slurm_options, stored
from mone_common.checks import check
from mone_common.console import ReportedError, UserError, command
from mone_common.files import writing
from mone_common.run_folder import check_free
from mone_common.secrets import masked
from train.config import RunConfig, load_config
from train.preparation import prepare_run


@dataclass
class SlurmConfig(RunConfig):
    """Options of a run and of its Slurm job."""

    launch: SlurmOptions = field(default_factory=SlurmOptions)


ConfigStore.instance().store(name="slurm_config", node=stored(SlurmConfig, "launch.environment"))


class NotSubmitted(ReportedError):
    """Slurm rejected the job."""


class _JobScript(string.Template):
    """Placeholders begin with @, because bash uses $."""

    delimiter = "@"


@command("slurm")
def _submit(hydra_config: DictConfig) -> None:
    try:
        options = read_slurm_options(hydra_config.launch)
        folder = Path(load_config(hydra_config).run.dir) / "launch"
        check_free(folder.parent)
        # This comes before check_run, because a running job changes the folder.
        if not options.dry_run and (active := active_job(folder)):
            raise UserError(f"run.dir={folder.parent}: job {active} is queued or running there; `scancel {active}` ends it")
        config = check_run(hydra_config, options)
    except ValueError as error:
        raise UserError(str(error)) from error
    if options.dry_run:
        print(job_script(config, options), end="")
        return
    job = submit(config, options)
    print(f"job {job}: {options.world_size} processes on {options.nodes} nodes")
    print(f"  {folder}/log.txt    its output")
    print(f"  mone-status {config.run.dir}")


def main() -> None:
    """Submit the composed configuration; exit code 2 for a configuration error, 1 if Slurm rejects the job."""
    sys.argv = ["launch.dry_run=true" if argument == "--dry-run" else argument for argument in sys.argv]
    _submit()


def check_run(hydra_config: DictConfig, options: SlurmOptions) -> RunConfig:
    """The typed configuration of a run, checked for the job's number of processes; ValueError if it is invalid."""
    on_gpus = options.gpus_per_node > 0 and hydra_config.compute.transformer_impl != "local"
    per_node = "gpus_per_node" if options.processes_per_node is None else "processes_per_node"
    processes = f"{options.section}.nodes x {options.section}.{per_node}"
    config, _, _ = prepare_run(hydra_config, options.world_size, transformer_engine=on_gpus, processes=processes)
    check(
        options.dry_run or shutil.which("sbatch") is not None,
        f"{options.section}.dry_run",
        options.dry_run,
        "sbatch is not installed on this machine; --dry-run or dry_run=true prints the job script",
    )
    for name in options.pass_environment:
        check(
            options.dry_run or name in os.environ,
            f"{options.section}.pass_environment",
            name,
            "is not set in this environment; export it first",
        )
    job_script(config, options)  # raises ValueError for values that a script cannot contain
    return config


def submit(config: RunConfig, options: SlurmOptions) -> str:
    """Freeze a checked run and submit its job; return the job id.

    Raises UserError if the folder cannot be written, NotSubmitted if Slurm rejects the job.
    """
    folder = Path(config.run.dir) / "launch"
    launch = OmegaConf.to_yaml(OmegaConf.structured(options))
    freeze(config, {"launch.yaml": launch, "job.sh": job_script(config, options)})
    submitted = subprocess.run(["sbatch", "--parsable", str(folder / "job.sh")], capture_output=True, text=True)
    if submitted.returncode != 0:
        raise NotSubmitted(f"sbatch: {submitted.stderr.strip()} (job script: {folder / 'job.sh'})")
    job = submitted.stdout.strip().split(";")[0]
    with writing(folder / "job") as temporary:
        temporary.write_text(job + "\n")
    return job


def job_script(config: RunConfig, launch: SlurmOptions) -> str:
    """The bash script of the job, every value quoted; ValueError for a value with a control character."""
    folder = Path(config.run.dir).absolute() / "launch"
    # SlurmOptions checks all other strings.
    check(str(folder).isprintable(), "run.dir", repr(str(folder)), "its path must not contain control characters")
    spec = sys.modules["__main__"].__spec__
    command = [*(["python", "-m", spec.name] if spec is not None else sys.argv[:1]), *sys.argv[1:]]
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
        # sbatch expands % in this option.
        "output": str(folder / "log.txt").replace("%", "%%"),
        "chdir": str(Path.cwd()),
    }
    lines = [f"--{name}={value}" for name, value in options.items() if value is not None] + ["--requeue", *launch.sbatch]
    environment = [f"module load {shlex.quote(module)}" for module in launch.modules]
    environment += [f"export {name}={shlex.quote(value)}" for name, value in launch.environment.items()]
    passed = "not in the environment of this job: set it where you call sbatch, and let sbatch export it"
    environment += [f': "${{{name}:?{passed}}}"' for name in launch.pass_environment]
    container = []
    if launch.container is not None:
        runs = folder.parent.parent  # not the run folder: names of points have commas, which separate mounts
        mounts = [*launch.container_mounts, f"{runs}:{runs}"]
        container = [f"--container-image={launch.container}", f"--container-mounts={','.join(mounts)}"]
        container.append(f"--container-workdir={Path.cwd()}")
    for text in (*lines, *environment, *launch.setup, *container):
        if not text.isprintable():
            raise ValueError(
                f"{text!r}: contains a line break or another control character; remove it, or change to another folder "
                "if it is in the path of the current folder"
            )
    template = _JobScript((Path(__file__).parent / "templates/job.sh").read_text())
    return template.substitute(
        command="".join(letter if letter.isprintable() else " " for letter in shlex.join(map(masked, command))),
        sbatch="\n".join(f"#SBATCH {_quoted(line)}" for line in lines),
        frozen=shlex.quote(str(folder)),
        python=shlex.quote(launch.python),
        environment="\n".join([*environment, *launch.setup]),
        processes=launch.processes,
        restarts=launch.max_restarts,
        container=" ".join(map(shlex.quote, container)),
    )


def _quoted(option: str) -> str:
    """One option, quoted for an #SBATCH line; a backslash escapes the next character, also within quotes."""
    return '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"' if re.search(r"[\s'\"\\#]", option) else option


def active_job(folder: Path) -> str | None:
    """Id of this run's job if it is pending or running in Slurm, else None; NotSubmitted if squeue fails."""
    path = folder / "job"
    if not path.exists() or shutil.which("squeue") is None:
        return None
    job = path.read_text().strip()
    shown = subprocess.run(["squeue", "--noheader", "--jobs", job, "--format=%T"], capture_output=True, text=True)
    if shown.returncode != 0 and "Invalid job id" not in shown.stderr:
        raise NotSubmitted(f"squeue failed, so it is unknown whether job {job} is active: {shown.stderr.strip()}")
    return job if shown.stdout.strip() else None


if __name__ == "__main__":
    main()
