"""Hydra's command line with one-line errors.

run(task, "pretrain", "pkg://configs")     # as sys.argv requests: run the task or a sweep, or show the configuration or help

`hydra.main`, in contrast, prints errors in several lines, ends with exit code 1, and infers the types of values from text.
"""

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mone_common.console import UserError
from mone_common.option_types import nearest
from mone_common.options_help import paragraphs
from mone_common.output import leave_quietly
from mone_common.overrides import check_files, explain, read_overrides, read_sweep_params
from mone_common.run_folder import check_free
from mone_common.secrets import masked
from mone_common.text import printable


def run(task: Callable[[DictConfig], Any], name: str, path: str | None) -> None:
    """Run the command line with the configuration file `name` in `path`; UserError for errors in it."""
    flags = _read_flags()
    name = flags.config_name or name
    version.setbase("1.3")
    with _explained():
        hydra = Hydra.create_main_hydra2(task.__module__.rpartition(".")[2], _search_path(flags, path))
    try:
        if flags.shell_completion:
            try:
                hydra.shell_completion(name, flags.overrides)
            except ValueError as error:
                raise UserError(f"--shell-completion: {' '.join(str(error).split())}, like install=bash") from error
            return
        sections = [argument for argument in flags.overrides if flags.help and "=" not in argument]
        with _explained():
            given = [argument for argument in flags.overrides if argument not in sections]
            overrides = read_overrides(hydra, name, given, sweep=flags.multirun)
            config = hydra.compose_config(name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=False)
            check_files(hydra, name, overrides, config)
            if flags.package not in (None, "_global_") and OmegaConf.select(config, flags.package) is None:
                raise UserError(f"--package {flags.package}: no such section of the configuration")
            sweep = flags.multirun or config.hydra.mode == RunMode.MULTIRUN
            if flags.help or flags.hydra_help or flags.cfg is not None or flags.info is not None:
                with redirect_stdout(io.StringIO()) as shown:  # print once: with a closed pipe, logging reports every line
                    _show(hydra, flags, name, overrides, sections)
                try:
                    print(shown.getvalue(), end="", flush=True)
                except BrokenPipeError:
                    leave_quietly(0)  # the reader has read as much as it needs
                return
            if sweep:
                _check_sweep(config, hydra.compose_config(name, [], RunMode.MULTIRUN))
                params = read_sweep_params(config)
                hydra.multirun(name, task, [*overrides, *params, "hydra.mode=MULTIRUN"])
                return
        hydra.run(name, task, overrides)
    finally:
        GlobalHydra.instance().clear()


def _read_flags() -> argparse.Namespace:
    """Hydra's flags and the overrides, in any order."""
    for argument in sys.argv:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(f"{ascii(masked(argument))}: is not UTF-8")
    parser = get_args_parser()

    def fail(message: str) -> NoReturn:
        raise UserError(f"{printable(masked(message))}; options are given as NAME=VALUE, see --help")

    parser.error = fail  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args()
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    if len([mode for mode in modes if getattr(flags, mode)]) > 1:
        raise UserError(f"give only one of {', '.join('--' + mode.replace('_', '-') for mode in modes)}")
    if flags.resolve and not flags.cfg:
        raise UserError("--resolve: goes with --cfg only")
    if flags.experimental_rerun is not None:
        raise UserError("--experimental-rerun: is not supported; config.yaml of the run's folder has all its options")
    return flags


def _search_path(flags: argparse.Namespace, path: str | None) -> Any:
    search_path = create_config_search_path(flags.config_path or path)
    if flags.config_dir is not None:
        if not os.path.isdir(flags.config_dir):
            raise UserError(f"--config-dir {flags.config_dir}: no such folder")
        # As Hydra does: before the schemas, which would otherwise override files of the same name.
        folder = f"file://{os.path.abspath(flags.config_dir)}"
        search_path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
    return search_path


def _show(hydra: Hydra, flags: argparse.Namespace, name: str, overrides: list[str], sections: list[str]) -> None:
    """Print help, the configuration, or its sources."""
    parser, flags.overrides = get_args_parser(), overrides
    if flags.help and sections:
        config = hydra.compose_config(name, overrides, RunMode.RUN)
        print("\n\n".join(_help_of(config, section) for section in sections))
    elif flags.help:
        hydra.app_help(name, parser, flags)
    elif flags.hydra_help:
        hydra.hydra_help(name, parser, flags)
    elif flags.cfg is not None:
        hydra.show_cfg(name, overrides, flags.cfg, flags.package, flags.resolve)
    else:
        hydra.show_info(flags.info, name, overrides)


def _help_of(config: DictConfig, section: str) -> str:
    """Help for a section of options, for one option, or for all; UserError for an unknown name."""
    kind = OmegaConf.get_type(config)
    options = paragraphs(kind) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else {}
    if (launcher := _launcher(config)) is not None:
        options |= paragraphs(launcher, "hydra.launcher.")
    found = [text for option, text in options.items() if section == "all" or f"{option}.".startswith(f"{section}.")]
    if not found:
        sections = list(dict.fromkeys(name.rpartition(".")[0] for name in options if "." in name))
        hint = nearest(section, [*sections, *options], otherwise="")
        there = f"sections are {', '.join(sections)}" if sections else "this command has no sections"
        raise UserError(f"--help {section}: no such section or option; {f'{hint} ' * bool(hint)}{there}")
    return "\n".join(found)


def _check_sweep(config: DictConfig, own: DictConfig) -> None:
    """UserError for a sweep that cannot start, before a sweeper writes anything; own: the config without overrides."""
    if _launcher(own) is None or _launcher(config) is None:
        raise UserError("--multirun: sweeps are started by `mone-pretrain --multirun`, with hydra/launcher=local or slurm")
    try:
        OmegaConf.to_object(config.hydra.launcher)
        check_free(Path(config.hydra.sweep.dir), sweep=True)
    except ValueError as error:
        raise UserError(str(error)) from error


def _launcher(config: DictConfig) -> type | None:
    """The options class of the chosen launcher of this project; None for a launcher of Hydra."""
    kind = OmegaConf.get_type(config.hydra, "launcher")
    return kind if isinstance(kind, type) and kind.__module__.startswith("hydra_plugins.") else None


@contextmanager
def _explained() -> Iterator[None]:
    """Raise errors of Hydra, OmegaConf and YAML as UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(explain(error)) from error
