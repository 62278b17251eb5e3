"""Help text from the docstrings of options: for all options of a command, or an overview by section.

options_help("data_prep.verify.VerifyConfig")     # ${options_help:...} in a configuration file
sections_help("train.config.RunConfig")
paragraphs(RunConfig)["model.activation_ratio"]   # "  model.activation_ratio=1.0\n      Share of ..."
"""

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from typing import Any

WIDTH = 110


def options_help(name: str) -> str:
    """One paragraph per option of the dataclass with the dotted `name`: option=default and its docstring."""
    return _escaped(paragraphs(_find(name)).values())


def sections_help(name: str) -> str:
    """Like `options_help` for options outside sections and those added to the base dataclass; names of the others."""
    kind = _find(name)
    base = kind.__mro__[1]
    inherited = {field.name for field in fields(base)} if is_dataclass(base) else set()
    sections = {field.name for field in fields(kind) if is_dataclass(field.type)}
    brief = [field.name for field in fields(kind) if field.name in sections and (field.name in inherited or not inherited)]
    options = paragraphs(kind)
    own = [text for option, text in options.items() if option.partition(".")[0] not in inherited and inherited]
    alone = [text for option, text in options.items() if option not in sections and "." not in option and text not in own]
    lines = []
    for section in brief:
        names = [option.partition(".")[2] for option in options if option.startswith(f"{section}.")]
        lines.append(textwrap.fill(", ".join(names), WIDTH, initial_indent=f"  {section:<12}", subsequent_indent=" " * 14))
    how = "Sections: `--help SECTION` explains the options of a section, `--help all` all options."
    return _escaped([*own, *alone, "", how, *lines])


def paragraphs(kind: type[Any], prefix: str = "") -> dict[str, str]:
    """The help text of each option, by its dotted name."""
    docs: dict[str, str] = {}
    for base in filter(is_dataclass, reversed(kind.__mro__)):
        body = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(body, ast.ClassDef)
        docs |= {
            node.target.id: ast.literal_eval(text.value)
            for node, text in zip(body.body, body.body[1:], strict=False)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(text, ast.Expr)
        }
    found: dict[str, str] = {}
    for field in fields(kind):
        name = prefix + field.name
        if is_dataclass(field.type):
            found |= paragraphs(field.type, f"{name}.")  # type: ignore[arg-type]
        elif field.name in docs:
            value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
            default = "null" if value is None else str(value)
            text = "\n".join(f"      {line.strip()}" for line in docs[field.name].splitlines())
            found[name] = f"  {name}{'  (required)' if default == '???' else '=' + default}\n{text}"
    return found


def _find(name: str) -> type[Any]:
    module, _, kind = name.rpartition(".")
    found = getattr(importlib.import_module(module), kind)
    assert isinstance(found, type)
    return found


def _escaped(lines: Iterable[str]) -> str:
    return "\n".join(lines).replace("$", "$$")  # Hydra's help is a string.Template
