"""What a queued run will execute, whatever happens to the checkout in the meantime: code and configuration in its folder.

freeze(config, {"job.sh": script})          # runs/mine/launch: code/, frozen.yaml, job.sh

`--config-dir runs/mine/launch --config-name frozen` then runs it, with runs/mine/launch/code on PYTHONPATH
and PYTHONSAFEPATH set, without which the working directory would come first.
"""

import shutil
from pathlib import Path

from omegaconf import OmegaConf

from mone_common.commands import PACKAGES
from mone_common.console import UserError
from mone_common.files import writing
from train.config import RunConfig, describe
from train.pretrain import commit

FROZEN = """# Composed and checked before it was queued; the job runs exactly this. Code: ./code, commit {commit}.
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
    """Put code, configuration and further files by name into `launch/` of the run folder; UserError if they cannot be."""
    folder = Path(config.run.dir) / "launch"
    described = describe(config)
    described.pop("launch", None)  # of launch.slurm's own configuration
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "code", ignore_errors=True)
        here = Path(__file__).parent.parent
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(here / package, folder / "code" / package, ignore=ignored)
        (folder / "code/COMMIT").write_text(f"{commit()}\n")
        frozen = FROZEN.format(commit=commit(), config=OmegaConf.to_yaml(described))
        for name, text in {"frozen.yaml": frozen, **files}.items():
            with writing(folder / name) as temporary:
                temporary.write_text(text)
    except OSError as error:
        raise UserError(f"run.dir={config.run.dir}: cannot be written ({error}); give another run.dir") from error
