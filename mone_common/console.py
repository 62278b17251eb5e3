"""What the command lines share: help out of the options' docstrings, typed options, errors that read well.

    @command("verify")                            # configs/verify.yaml, as @hydra.main would
    def main(config: DictConfig) -> None:
        options = to_dataclass(config, VerifyConfig)

A configuration file shows its options in --help with ${options_help:data_prep.verify.VerifyConfig}, or those of a command
of many sections with ${sections_help:train.config.RunConfig}; --help SECTION then shows the rest.
"""

import argparse
import contextlib
import dataclasses
import functools
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, ParamSpec, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mone_common.commands import PACKAGES
from mone_common.options_help import options_help, sections_help
from mone_common.output import ending_with_reader

Options = TypeVar("Options")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ReportedError(Exception):
    """Says by itself what went wrong: a command tells it without a traceback and ends with its exit code."""

    exit_code = 1
    of_all_ranks = False
    """Whether all processes of a job raise it at once, so that the first may tell it for all, in its own words."""


class UserError(ReportedError, ValueError):
    """An option, or data or a folder it names, is at fault; the message says which one and what would be right."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """For commands with flags of their own: a wrong one is told on one line."""

    def error(self, message: str) -> NoReturn:
        """End the command with exit code 2."""
        from mone_common.run_folder import printable

        self.exit(2, f"error: {printable(message)}; see --help\n")


EXAMPLES = {
    "corpus.path": "'corpus.path=data/demo/text/*.jsonl'",
    "tokenizer": "tokenizer=data/demo/tokenizer",
    "path": "path=data/demo/shards/wikipedia",
    "output": "output=data/demo/out",
    "run": "run=runs/demo",
    "data.blend": "'data.blend=[{path: data/mine}]'",
}


def to_dataclass(config: DictConfig, kind: type[Options]) -> Options:
    """`config` as an instance of the dataclass that describes it.

    Raises UserError that names every mandatory option left out and shows how to give it, or a value that cannot be used.
    """
    from mone_common.overrides import explain

    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            how = " ".join(EXAMPLES.get(option.partition("[")[0], f"{option}=VALUE") for option in missing)
            raise UserError(f"missing {', '.join(missing)}: give it on the command line, like {how} (see --help)")
        options = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(options, kind)
    for name, value in _numbers(options):
        if not math.isfinite(value):
            raise UserError(f"{name}={value}: must be a finite number")
    return options


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All floating-point numbers within options, by dotted names."""
    if isinstance(value, float):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _numbers(inner, f"{name}[{place}]")


class _ToStderr(logging.Handler):
    """Prints a note as it is, and a warning as `warning: <message>`."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(f"{prefix}{record.getMessage()}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def showing_log() -> Iterator[None]:
    """Show what our packages log, from INFO on, on stderr.

    A program of somebody else's that imports them decides by itself: each module logs under its own name, such as
    `data_prep.progress`.
    """
    loggers = [logging.getLogger(package) for package in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    handler = _ToStderr()
    for logger in loggers:
        if not any(isinstance(other, _ToStderr) for other in logger.handlers):
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def reporting_errors(main: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn a ReportedError into `error: <message>` on stderr and its exit code; others are our mistakes.

    Ends silently when the reader of the output has ended. Meanwhile our log messages are shown on stderr.
    """

    @functools.wraps(main)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with ending_with_reader(), showing_log():
            try:
                return main(*args, **kwargs)
            except ReportedError as error:
                if os.environ.get("HYDRA_FULL_ERROR") == "1":
                    traceback.print_exc()
                print(f"error: {error}", file=sys.stderr)
                sys.exit(error.exit_code)
            except KeyboardInterrupt:
                print("interrupted; run the same command again to continue", file=sys.stderr)
                sys.exit(130)

    return run


def command(
    name: str, path: str | None = "pkg://configs", *, launched: bool = False
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Make a command of a function of its composed configuration: Hydra's command line over the file `name` in `path`.

    In place of `@hydra.main`, whose flags it has: a mistake in options or configuration files ends the command with one
    line and exit code 2, as a ReportedError of the function does, and text stays as it was typed (mone_common.overrides).

    launched: torchrun starts several processes with one command line; the first on each machine tells what is wrong in it.
    """

    def decorate(task: Callable[[DictConfig], None]) -> Callable[[], None]:
        @reporting_errors
        @functools.wraps(task)
        def main() -> None:
            from mone_common.command_line import run

            try:
                run(reporting_errors(task), name, path)
            except ReportedError as error:
                several = {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= os.environ.keys()
                if launched and several and os.environ.get("LOCAL_RANK", "0") != "0":
                    sys.exit(error.exit_code)
                raise

        return main

    return decorate


# For help texts in configuration files.
OmegaConf.register_new_resolver("options_help", options_help, replace=True)
OmegaConf.register_new_resolver("sections_help", sections_help, replace=True)
