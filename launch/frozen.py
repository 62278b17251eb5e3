"""Copies code and configuration into the folder of a queued run, so that later changes of the checkout do not affect it.

freeze(config, {"job.sh": script})          # runs/mine/launch: code/, frozen.yaml, job.sh

`--config-dir runs/mine/launch --config-name frozen` then runs it, with runs/mine/launch/code on PYTHONPATH.
PYTHONSAFEPATH must be set: otherwise Python searches the working directory first.
"""

import shutil
from pathlib import Path

from omegaconf import OmegaConf

from mone_common.checkout import commit
from mone_common.commands import PACKAGES, ROOT
from mone_common.console import UserError
from mone_common.files import writing
from train.config import RunConfig, describe

FROZEN = """# The composed and checked configuration that the job runs. Code: ./code, commit {commit}.
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


def freeze(config: RunConfig, files: dict[str, str]) -> None:
    """Write code, configuration and `files` (name to text) to `launch/` of the run folder; UserError if this fails."""
    folder = Path(config.run.dir) / "launch"
    described = describe(config)
    described.pop("launch", None)  # options of launch.slurm, which the run does not have
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "code", ignore_errors=True)
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, folder / "code" / package, ignore=ignored)
        (folder / "code/COMMIT").write_text(f"{commit()}\n")
        frozen = FROZEN.format(commit=commit(), config=OmegaConf.to_yaml(described))
        for name, text in {"frozen.yaml": frozen, **files}.items():
            with writing(folder / name) as temporary:
                temporary.write_text(text)
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir}: cannot be written ({error}); give another run.dir") from error
