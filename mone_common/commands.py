"""Start this project's commands with its own packages, whatever lies in the current folder.

mone-status = "mone_common.commands:status"           # in pyproject.toml
check_packages("configs", "launch", "train")          # in the __init__.py of what `python -m` starts
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
"""Process id of what started this process, noted before the seconds in which everything else is imported."""
ROOT = Path(__file__).resolve().parent.parent
"""The folder of all our packages."""
PACKAGES = ("configs", "data_prep", "hydra_plugins", "launch", "mone_common", "mone_model", "train")


class UnusablePackage(ImportError):
    """A package that is installed, or found first, is not the one needed; the message is one line."""


def _command(module: str) -> Callable[[], None]:
    """The `main` of a module, with our packages before others of their names."""

    def run() -> None:
        # With PYTHONPATH=. the current folder comes before us. Not always: packages may have names of Python's own library.
        if find_shadow(*PACKAGES) is not None:
            sys.path.insert(0, str(ROOT))
        if shadow := find_shadow(*PACKAGES):
            _end(shadow)
        try:
            main = importlib.import_module(module).main
        except UnusablePackage as error:
            _end(str(error))
        main()

    return run


pretrain = _command("train.pretrain")
sample = _command("train.sample")
calibrate = _command("train.calibrate")
status = _command("launch.status")
slurm = _command("launch.slurm")
report = _command("launch.report")
plan = _command("launch.plan")
train_tokenizer = _command("data_prep.tokenizer_training")
tokenize = _command("data_prep.tokenize")
verify = _command("data_prep.verify")


def tokenizer() -> None:
    """`mone-train-tokenizer` under the name that it had before version 0.2."""
    from mone_common.console import showing_log

    with showing_log():
        deprecated("mone-tokenizer", "mone-train-tokenizer")
    train_tokenizer()


def find_shadow(*packages: str) -> str | None:
    """Which of these packages Python would take from elsewhere, and from where, in words; None if all are ours."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        found = [*(spec.submodule_search_locations or [])] or [spec.origin or "an unknown place"]
        if os.path.realpath(ROOT / name) not in map(os.path.realpath, found):
            where = spec.origin if spec.has_location and spec.origin else found[0]
            return (
                f"{where} stands before this project's package `{name}`, in {ROOT}; rename it, or use the commands "
                "mone-pretrain, mone-tokenize, ... or another folder, which do not look there"
            )
    return None


def check_packages(*packages: str) -> None:
    """Refuse packages that are not ours, as `refuse` does."""
    if shadow := find_shadow(*packages):
        refuse(shadow)


def refuse(problem: str) -> NoReturn:
    """End a command that is being started by `python -m` with exit code 2; raise UnusablePackage elsewhere."""
    if sys.argv[:1] == ["-m"]:
        _end(problem)
    raise UnusablePackage(problem)


def _end(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)
