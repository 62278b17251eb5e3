"""Entry points of the commands. They import this project's packages even if the current folder has packages of these names.

mone-status = "mone_common.commands:status"           # in pyproject.toml
check_packages("configs", "launch", "train")          # in the __init__.py of packages that `python -m` starts
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mone_common.checks import deprecated

PARENT = os.getppid()
"""Process id of the parent at the start, read before imports that take seconds."""
ROOT = Path(__file__).resolve().parent.parent
"""The folder of this project's packages."""
PACKAGES = ("configs", "data_prep", "hydra_plugins", "launch", "mone_common", "mone_eval", "mone_model", "train")
"""This project's packages, as in pyproject.toml."""


def _command(module: str) -> Callable[[], None]:
    """The `main` of a module, with this project's packages first on the path."""

    def run() -> None:
        # With PYTHONPATH=. the current folder comes first. Change the path only if a package of it shadows one of ours.
        if find_shadow(*PACKAGES) is not None:
            sys.path.insert(0, str(ROOT))
        if shadow := find_shadow(*PACKAGES):
            _end(shadow)
        importlib.import_module(module).main()

    return run


pretrain = _command("train.pretrain")
sample = _command("train.sample")
evaluate = _command("mone_eval.evaluate")
sparsify = _command("mone_eval.sparsify")
calibrate = _command("train.calibrate")
export = _command("mone_model.hf.export")
import_model = _command("mone_model.hf.import_model")
status = _command("launch.status")
slurm = _command("launch.slurm")
report = _command("launch.report")
plan = _command("launch.plan")
train_tokenizer = _command("data_prep.tokenizer_training")
tokenize = _command("data_prep.tokenize")
verify = _command("data_prep.verify")


def tokenizer() -> None:
    """The deprecated name of `mone-train-tokenizer`, used before version 0.2."""
    deprecated("mone-tokenizer", "mone-train-tokenizer")
    train_tokenizer()


def find_shadow(*packages: str) -> str | None:
    """A message if Python would import one of these packages from another location; None if not."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        found = [*(spec.submodule_search_locations or [])] or [spec.origin or "an unknown place"]
        if os.path.realpath(ROOT / name) not in map(os.path.realpath, found):
            where = spec.origin if spec.has_location and spec.origin else found[0]
            return (
                f"{where} shadows this project's package `{name}` in {ROOT}; rename it, use the commands "
                "mone-pretrain, mone-tokenize, ..., or work in another folder"
            )
    return None


def check_packages(*packages: str) -> None:
    """If one of these packages is shadowed: exit code 2 under `python -m`, otherwise ImportError."""
    if shadow := find_shadow(*packages):
        if sys.argv[:1] == ["-m"]:
            _end(shadow)
        raise ImportError(shadow)


def _end(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
