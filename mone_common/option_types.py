"""The declared types of options, and checks of values against them.

declared(config, "data.blend")                      # list[SourceConfig]; None: no such option
check_value("training.steps", int, "many", "many")  # UserError: training.steps=many: must be a whole number
nearest("model.activation_ration", option_names(config))   # "did you mean model.activation_ratio?"
"""

import dataclasses
import difflib
import math
import re
import shlex
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import BooleanNode, Container, DictConfig, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import ValidationError

from mone_common.console import UserError

WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
NODES: dict[Any, Any] = {int: IntegerNode, float: FloatNode, bool: BooleanNode}
UNITS = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}


def declared(config: DictConfig, name: str) -> Any:
    """The declared type of the option with this dotted name; None if there is no such option."""
    kind: Any = OmegaConf.get_type(config)
    node: Any = config
    for part in name.split("."):
        kind = child_kind(kind, part)
        node = node._get_node(part, validate_access=False) if isinstance(node, DictConfig) and not node._is_none() else None
        if node is not None and (kind is None or kind is Any):
            kind = OmegaConf.get_type(node) if isinstance(node, Container) else Any
            kind = Any if kind in (dict, list, None) else kind
        if kind is None:
            return None
    return kind


def within_mapping(config: DictConfig, name: str) -> bool:
    """Whether the name is a key within an option that is a mapping."""
    parts = name.split(".")
    above = (declared(config, ".".join(parts[:length])) for length in range(1, len(parts)))
    return any(dict in map(origin_of, members_of(kind)) for kind in above if kind is not None)


def child_kind(kind: Any, part: str) -> Any:
    """The type of the member `part` of a value of this type; None if there is no such member."""
    for member in members_of(kind):
        if dataclasses.is_dataclass(member):
            field = {field.name: field for field in dataclasses.fields(member)}.get(part)
            if field is not None:
                # OmegaConf does not support a union of text and lists: such a field is Any, with its type in the metadata.
                return field.metadata.get("kind", typing.get_type_hints(member)[part])
        elif origin_of(member) is dict:
            return (typing.get_args(member) or (Any, Any))[1]
        elif origin_of(member) is list and part.isdigit():
            return (typing.get_args(member) or (Any,))[0]
        elif member is Any and kind is not Any:
            return Any
    return None


def members_of(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or a tuple of the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def origin_of(kind: Any) -> Any:
    """The class of a generic type, such as list of list[int]; any other type itself."""
    return typing.get_origin(kind) or kind


def check_value(name: str, kind: Any, value: Any, text: str) -> None:
    """UserError unless the value, which the user typed as `text`, has the type."""
    members = members_of(kind)
    if kind is None or Any in members or _is_later(value) or (value is None and type(None) in members):
        return
    origins = {origin_of(member): member for member in members if member is not type(None)}
    section = next((member for member in members if dataclasses.is_dataclass(member)), None)
    if isinstance(value, dict) and (section is not None or dict in origins):
        for key, inner in value.items():
            inner_kind = child_kind(kind, str(key))
            if inner_kind is None:
                assert section is not None
                names = [field.name for field in dataclasses.fields(section)]
                hint = nearest(str(key), names, otherwise=f"there are {', '.join(names)}")
                raise UserError(f"{name}={text}: no such option as {key}; {hint}")
            check_value(f"{name}.{key}", inner_kind, inner, str(inner))
    elif isinstance(value, list) and list in origins:
        inner_kind = (typing.get_args(origins[list]) or (Any,))[0]
        for place, inner in enumerate(value):
            if dataclasses.is_dataclass(inner_kind) and not isinstance(inner, dict):
                raise UserError(f"{name}={text}: must be {_wanted(name, kind, value, str(inner))}")
            check_value(f"{name}[{place}]", inner_kind, inner, str(inner))
    elif isinstance(value, dict | list) or not any(_converts(member, value) for member in origins):
        raise UserError(f"{name}={text}: must be {_wanted(name, kind, value, text)}")


def _is_later(value: Any) -> bool:
    """Whether the value is resolved later: an interpolation, or missing."""
    return isinstance(value, str) and ("${" in value or value == "???")


def _converts(kind: Any, value: Any) -> bool:
    """Whether OmegaConf would convert the value, which is no list or mapping, to this type."""
    if kind is str:
        return value is not None
    try:
        return kind in NODES and NODES[kind](value=value, is_optional=False) is not None
    except ValidationError:
        return False


def _wanted(name: str, kind: Any, value: Any, text: str) -> str:
    """The expected type, with an example."""
    members = [member for member in members_of(kind) if member is not type(None)]
    null = ", or null" if type(None) in members_of(kind) else ""
    first = members[0]
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return f"given option by option, like {name}.{names[0]}=VALUE"
    if origin_of(first) is dict:
        return "a mapping, like " + shlex.quote(f"{name}={{NAME: VALUE}}")
    if origin_of(first) is list:
        return "a list, like " + shlex.quote(f"{name}={example_of(first, text)}") + null
    if first is str:
        return "text, like " + shlex.quote(f"{name}={example_of(first, text)}") + null
    if first is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return f"a whole number, like {name}={int(value)}{null}"
    unit = re.fullmatch(r"([0-9.]+) ?([kmbgt])", text.lower()) if first is float else None
    example = f", like {name}={unit[1]}e{UNITS[unit[2]]}" if unit else ""
    return f"{WANTED.get(first, 'of another type')}{example}{null}"


def example_of(kind: Any, text: str) -> str:
    """The text, written as a value of the type."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if origin_of(kind) is list:
        inner = text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text
        return f"[{example_of((typing.get_args(kind) or (Any,))[0], inner)}]"
    if dataclasses.is_dataclass(kind):
        if text.startswith("{"):  # the position of the error is unknown
            return f'{{{dataclasses.fields(kind)[0].name}: "VALUE"}}'
        return f"{{{dataclasses.fields(kind)[0].name}: {text if _is_plain(text) else example_of(str, text)}}}"
    if kind is str or kind is Any:
        return QuotedString(text, Quote.double).with_quotes()
    return text


def _is_plain(text: str) -> bool:
    return bool(text) and not set(text) & set("\\()[]{}:=, \t'\"$")


def nearest(name: str, names: Iterable[str], *, otherwise: str = "see --help") -> str:
    """Suggestions for an unknown name, as the end of a sentence."""
    names = list(names)
    section, _, last = name.rpartition(".")
    parts: dict[str, list[str]] = {}
    for known in names:
        parts.setdefault(known.rpartition(".")[2], []).append(known)
    within = {known.rpartition(".")[2]: known for known in names if known.rpartition(".")[0] == section}
    found = parts.get(last) or [within[part] for part in difflib.get_close_matches(last, within, 2, 0.7)]
    found = found or [known for part in difflib.get_close_matches(last, parts, 3, 0.75) for known in parts[part]]
    found = (found or difflib.get_close_matches(name, names, 3, 0.75))[:3]
    if not found:
        return otherwise
    return f"did you mean {', '.join(found[:-1])}{' or ' * (len(found) > 1)}{found[-1]}?"


def option_names(config: DictConfig) -> list[str]:
    """The dotted names of all options and sections; of Hydra's options, those of the launcher and of folders."""
    return [
        name
        for name in _names(config)
        if not name.startswith("hydra") or name.startswith(("hydra.launcher.", "hydra.sweep.", "hydra.run."))
    ]


def _names(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, node in config.items_ex(resolve=False):
        name = f"{prefix}{key!s}"
        yield name
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _names(node, f"{name}.")
