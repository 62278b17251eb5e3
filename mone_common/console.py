"""Common parts of the commands: help from the options' docstrings, typed options, one-line errors.

    @command("verify")                            # reads configs/verify.yaml, like @hydra.main
    def main(config: DictConfig) -> None:
        options = to_dataclass(config, VerifyConfig)

In a configuration file, ${options_help:data_prep.verify.VerifyConfig} adds its options to --help. For commands with many
sections, ${sections_help:train.config.RunConfig} adds an overview; --help SECTION then shows the options of a section.
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
from mone_common.text import printable

Options = TypeVar("Options")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ReportedError(Exception):
    """An error whose message is sufficient: a command prints it without a traceback and ends with its exit code."""

    exit_code = 1
    of_all_ranks = False
    """Whether all ranks of a job raise it at the same time, so that rank 0 prints it for all."""


class UserError(ReportedError, ValueError):
    """An invalid option, or invalid data or an invalid folder that it names; the message says what would be valid."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, for commands that do not use Hydra."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"error: {printable(message)}; see --help\n")


EXAMPLES = {
    "corpus.path": "'corpus.path=data/demo/text/*.jsonl'",
    "tokenizer": "tokenizer=data/demo/tokenizer",
    "path": "path=data/demo/shards/wikipedia",
    "output": "output=data/demo/out",
    "run": "run=runs/demo",
    "source": "source=models/qwen",
    "data.blend": "'data.blend=[{path: data/mine}]'",
}


def to_dataclass(config: DictConfig, kind: type[Options]) -> Options:
    """Convert `config` to its dataclass.

    Raises UserError for an invalid value, and for missing mandatory options, with examples.
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
    """All floating-point numbers in the options, with dotted names."""
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

    A program that imports the packages can configure logging itself: each module logs under its own name, such as
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
    """Wrap a `main`: a ReportedError is printed as `error: <message>` on stderr, and its exit code is used.

    Other exceptions pass. If the reader of the output has ended, the process ends silently.
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
    """Decorator that makes a command of a function of the composed configuration; `name` is a configuration file in `path`.

    Replaces `@hydra.main` and has its flags. An error in options or configuration files ends the command with one line and
    exit code 2, and text is not read as numbers (mone_common.overrides).

    launched: torchrun starts several processes with the same command line; only the first on each machine prints an error.
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
