"""Files about a run in its folder: configuration, environment, status, data. Imports no torch.

lock = take_run_folder(config)                        # config.yaml, environment.json
write_status(config, "running")                       # status.json
note_failure(config, "out of memory", exit_code=1)
write_reading(config, data.reading)                   # data.json
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from mone_common.checkout import commit
from mone_common.files import writing
from mone_common.run_folder import CONFIG_FILE, ENVIRONMENT_FILE, READING_FILE, STATUS_FILE, lock_run_folder
from mone_common.run_records import read_status
from train.config import RunConfig
from train.launcher import rank_and_world_size
from train.sample_order import Reading


def take_run_folder(config: RunConfig) -> IO[str]:
    """Lock the run folder and write config.yaml and environment.json.

    ValueError if another run uses the folder, or it cannot be written. The lock is held while the returned file is open.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_run_folder(folder)
        for name, text in {
            CONFIG_FILE: OmegaConf.to_yaml(OmegaConf.structured(config)),
            ENVIRONMENT_FILE: json.dumps(environment(), indent=1) + "\n",
        }.items():
            with writing(folder / name) as temporary:
                temporary.write_text(text)
        return lock
    except OSError as error:
        raise ValueError(f"run.dir={folder}: cannot be written ({error}); give another run.dir") from error


def write_status(config: RunConfig, state: str, **more: Any) -> None:
    """Write the state of the run to status.json; ignores a missing folder or full disk, which other messages report."""
    with contextlib.suppress(OSError), writing(Path(config.run.dir) / STATUS_FILE) as temporary:
        temporary.write_text(json.dumps({"state": state, "time": round(time.time(), 3), **more}) + "\n")


def note_failure(config: RunConfig, reason: str, exit_code: int) -> None:
    """Write the reason of a failure to status.json, unless another rank has: the first failure is the cause."""
    with contextlib.suppress(OSError, ValueError):
        if read_status(Path(config.run.dir)).get("state") == "running":
            write_status(config, "failed", reason=reason, exit_code=exit_code)


def write_reading(config: RunConfig, reading: list[Reading]) -> None:
    """Write the tokens and epochs of each source to data.json, for mone-report."""
    with contextlib.suppress(OSError), writing(Path(config.run.dir) / READING_FILE) as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(source) for source in reading], indent=1) + "\n")


def environment() -> dict[str, Any]:
    """Versions, machine and command of this process."""
    packages = ("mone", "torch", "megatron-core", "deepspeed", "transformer-engine", "triton", "numpy")
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.orig_argv,
        "commit": commit(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "processor": _processor(),
        "world_size": rank_and_world_size()[1],
        "packages": versions,
    }


def _processor() -> str:
    """Kind of the processor and the vector instructions it has, on Linux; which losses depend on, by rounding."""
    with contextlib.suppress(OSError):
        lines = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t" in line)
        name, flags = (lines.get(key, "").lstrip("\t: ") for key in ("model name", "flags"))
        found = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if flag in flags.split()]
        return " ".join([name or platform.machine(), *found])
    return platform.machine()
