"""What the command lines share: help out of the options' docstrings, typed options, errors that read well.

    @hydra.main(version_base="1.3", config_path="pkg://configs", config_name="verify")
    @reporting_errors
    def main(config: DictConfig) -> None:
        options = typed(config, VerifyConfig)

A configuration file shows its options in --help with ${options_help:data_prep.verify.VerifyConfig}.
"""

import ast
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from typing import Any, ParamSpec, TypeVar

from omegaconf import DictConfig, OmegaConf

Options = TypeVar("Options")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ReportedError(Exception):
    """Says by itself what went wrong: a command tells it without a traceback and ends with its exit code."""

    exit_code = 1


class UserError(ReportedError, ValueError):
    """An option, or data or a folder it names, is at fault; the message says which one and what would be right."""

    exit_code = 2


EXAMPLES = {
    "corpus.path": "'corpus.path=data/demo/text/*.jsonl'",
    "tokenizer": "tokenizer=data/demo/tokenizer",
    "path": "path=data/demo/shards/wikipedia",
    "output": "output=data/demo/out",
    "run": "run=runs/demo",
}


def typed(config: DictConfig, kind: type[Options]) -> Options:
    """`config` as an instance of the dataclass that describes it.

    Raises UserError that names every mandatory option left out and shows how to give it.
    """
    if missing := sorted(OmegaConf.missing_keys(config)):
        how = " ".join(EXAMPLES.get(option, f"{option}=VALUE") for option in missing)
        raise UserError(f"missing {', '.join(missing)}: give it on the command line, like {how} (see --help)")
    options = OmegaConf.to_object(config)
    assert isinstance(options, kind)
    return options


def reporting_errors(main: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn a ReportedError into `error: <message>` on stderr and its exit code; others are our mistakes."""

    @functools.wraps(main)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return main(*args, **kwargs)
        except ReportedError as error:
            # Every process of a distributed job finds the same; one says it.
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            sys.exit(130)

    return run


def options_help(name: str, prefix: str = "") -> str:
    """One paragraph per option of the dataclass with the dotted `name`: prefix, option=default and its docstring."""
    module, _, kind = name.rpartition(".")
    text = "\n".join(_paragraphs(getattr(importlib.import_module(module), kind), prefix))
    return text.replace("$", "$$")  # Hydra's help is a string.Template


def _paragraphs(kind: type[Any], prefix: str) -> list[str]:
    docs: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(kind.__mro__)):
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        docs |= {
            node.target.id: ast.literal_eval(text.value)
            for node, text in zip(body.body, body.body[1:], strict=False)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(text, ast.Expr)
        }
    paragraphs = []
    for field in fields(kind):
        if is_dataclass(field.type):
            paragraphs += _paragraphs(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
        default = "null" if value is None else str(value)
        text = "\n".join(f"      {line.strip()}" for line in docs[field.name].splitlines())
        required = "  (required)" if default == "???" else ""
        paragraphs.append(f"  {prefix}{field.name}{required or '=' + default}\n{text}")
    return paragraphs


OmegaConf.register_new_resolver("options_help", options_help, replace=True)
