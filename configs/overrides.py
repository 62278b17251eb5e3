"""What is typed on a command line, read by the declared types of the options.

    overrides = read_overrides(hydra, "pretrain", ["run.name=2024_10_01", "model=mone_small"], sweep=False)
    -> ["run.name='2024_10_01'", "model=mone_small"]

Hydra takes the type of a value from its text: 2024_10_01 is the number 20241001. Here the option decides: a number, a truth
value or null typed for an option that holds text is put in quotes, alone, in lists and mappings, and as a value of a sweep.
Whatever does not fit is a UserError on one line, which names the option, its value and what would be right.
"""

import dataclasses
import difflib
import math
import re
import shlex
import types
import typing
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from omegaconf import BooleanNode, Container, DictConfig, FloatNode, IntegerNode, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from configs.console import UserError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override

WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
NODES = {int: IntegerNode, float: FloatNode, bool: BooleanNode}
UNITS = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
CASTS = ("int", "float", "bool", "str", "json_str")


def read_overrides(hydra: "Hydra", config_name: str, arguments: list[str], *, sweep: bool) -> list[str]:
    """The overrides as Hydra shall read them.

    sweep: whether values separated by commas are the points of a sweep.
    Raises UserError for what is no override, an unknown option, group or choice, and a value of the wrong type.
    """
    from hydra.core.object_type import ObjectType
    from hydra.types import RunMode

    loader = hydra.config_loader
    parsed = {argument: _parse(argument) for argument in arguments}
    found = [argument for argument, override in parsed.items() if override and override.key_or_group == "hydra.searchpath"]

    def choices(group: str) -> list[str]:
        return loader.get_group_options(group, ObjectType.CONFIG, config_name, found)

    def compose(overrides: list[str]) -> DictConfig:
        return hydra.compose_config(config_name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=False)

    # The groups choose what options there are: of a launcher, for example.
    groups = {argument: override for argument, override in parsed.items() if override and choices(override.key_or_group)}
    known = list(compose(found).hydra.runtime.choices) if groups else []
    chosen = [_read_group(argument, override, choices, known) for argument, override in groups.items()]
    first = [f"{override.get_key_element()}={_points(override)[0]}" for _, override in chosen if not override.is_delete()]
    config = compose([*found, *first])
    read = dict(zip(groups, (text for text, _ in chosen), strict=True))
    for argument, override in parsed.items():
        if argument not in groups:
            read[argument] = _read_option(argument, override, config, sweep=sweep)
    return [read[argument] for argument in arguments]


def read_sweep_params(config: DictConfig) -> list[str]:
    """Overrides for those of a composed configuration's hydra.sweeper.params that Hydra shall read differently."""
    from hydra.core.override_parser.types import Quote, QuotedString

    changed = []
    for name, values in (OmegaConf.to_container(config.hydra.sweeper).get("params") or {}).items():  # type: ignore[union-attr]
        if _declared(config, name) is None:
            if name not in config.hydra.runtime.choices:
                raise UserError(f"hydra.sweeper.params: {name}: no such option; {nearest(name, option_names(config))}")
            continue
        argument = f"{name}={values}"
        read = _read_option(argument, _parse(argument), config, sweep=True)
        if read != argument:
            value = QuotedString(read.partition("=")[2], Quote.double).with_quotes()
            changed.append(f"hydra.sweeper.params={{{name}: {value}}}")
    return changed


def nearest(name: str, names: Iterable[str], *, otherwise: str = "see --help") -> str:
    """What may have been meant by an unknown name, as the end of a sentence."""
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
    """The dotted names of all options, sections too; of Hydra's own, those of the launcher and the folders of a sweep."""
    return [
        name
        for name in _names(config)
        if not name.startswith("hydra") or name.startswith(("hydra.launcher.", "hydra.sweep.", "hydra.run."))
    ]


def _names(config: DictConfig, prefix: str = "") -> Iterator[str]:
    for key, node in config.items_ex(resolve=False):
        yield f"{prefix}{key}"
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _names(node, f"{prefix}{key}.")


def _parse(argument: str) -> "Override | None":
    """The override, None if it cannot be read; UserError if it has no value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if "=" not in argument and not argument.startswith("~"):
        raise UserError(f"{argument}: options are given as NAME=VALUE; see --help")
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _read_group(argument: str, override: "Override", choices: Any, known: list[str]) -> "tuple[str, Override]":
    """A choice from a group of configuration files, text whatever it looks like."""
    group = override.key_or_group
    if override.is_delete() or override.package is not None:
        return argument, override
    if group not in known or not group:
        raise UserError(f"{argument}: this command has no such option; see --help")
    argument = argument.lstrip("+")
    text = _edited(argument, str)
    override = _parse(text)  # type: ignore[assignment]
    there = choices(group)
    points = _points(override)
    for choice in [one for point in points for one in (point if isinstance(point, list) else [point])]:
        if choice not in there:
            hint = nearest(str(choice), there, otherwise="")
            raise UserError(f"{group}={choice}: no such choice; choose from {', '.join(there)}{'; ' * bool(hint)}{hint}")
    return text, override


def _points(override: "Override") -> list[Any]:
    """The values of a sweep, or the only one."""
    from hydra.core.override_parser.types import Override

    if override.is_discrete_sweep():
        return [Override._convert_value(value) for value in override.sweep_iterator()]
    return [override.value()]


def _read_option(argument: str, override: "Override | None", config: DictConfig, *, sweep: bool) -> str:
    """One override of an option, checked, and with quotes where its text would not be read as text."""
    key, _, text = argument.partition("=")
    name = override.key_or_group if override is not None else key.lstrip("+~").strip()
    kind, within = _declared(config, name), _within_mapping(config, name)
    if kind is None:
        raise UserError(f"{argument}: no such option; {nearest(name, option_names(config))}")
    if override is None:
        if key.strip() != key or not text:
            raise UserError(f"{argument}: options are given as NAME=VALUE, without blanks around the name")
        raise UserError(f"{argument}: {_quoted_form(key, kind, text)}")
    if override.package is not None:
        raise UserError(f"{argument}: {name} is an option, not a group: give it as {name}=VALUE")
    if override.is_delete():
        if within:
            return argument
        raise UserError(f"{argument}: an option cannot be removed; give it another value, or null where --help says so")
    if override.is_sweep_override() and not sweep:
        raise UserError(f"{argument}: {_quoted_form(name, kind, text)}. Several values need --multirun")
    argument = f"{name}={_edited(argument, kind).partition('=')[2]}"
    edited = _parse(argument)
    assert edited is not None
    for point in _points(edited) if edited.is_discrete_sweep() or not edited.is_sweep_override() else []:
        _check(name, kind, point, text)
    # Hydra closes mappings, too, to new names.
    return f"++{argument}" if within or dict in map(_origin, _members(kind)) else argument


def _declared(config: DictConfig, name: str) -> Any:
    """The type of the option with this dotted name, as its dataclass declares it; None if there is none."""
    kind: Any = OmegaConf.get_type(config)
    node: Any = config
    for part in name.split("."):
        kind = _child_kind(kind, part)
        node = node._get_node(part, validate_access=False) if isinstance(node, DictConfig) and not node._is_none() else None
        if node is not None and (kind is None or kind is Any):
            kind = OmegaConf.get_type(node) if isinstance(node, Container) else Any
            kind = Any if kind in (dict, list, None) else kind
        if kind is None:
            return None
    return kind


def _within_mapping(config: DictConfig, name: str) -> bool:
    """Whether the name continues behind that of an option that is a mapping."""
    parts = name.split(".")
    above = (_declared(config, ".".join(parts[:length])) for length in range(1, len(parts)))
    return any(dict in map(_origin, _members(kind)) for kind in above if kind is not None)


def _child_kind(kind: Any, part: str) -> Any:
    """The type of what is called `part` within a value of this type; None if there is no such."""
    for member in _members(kind):
        if dataclasses.is_dataclass(member):
            field = {field.name: field for field in dataclasses.fields(member)}.get(part)
            if field is not None:
                # OmegaConf knows no union of text and lists: such a field is Any, and says here what it takes.
                return field.metadata.get("kind", typing.get_type_hints(member)[part])
        elif _origin(member) is dict:
            return (typing.get_args(member) or (Any, Any))[1]
        elif _origin(member) is list and part.isdigit():
            return (typing.get_args(member) or (Any,))[0]
        elif member is Any and kind is not Any:
            return Any
    return None


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, or the only one."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _origin(kind: Any) -> Any:
    return typing.get_origin(kind) or kind


def _edited(argument: str, kind: Any) -> str:
    """The override with quotes around what would not be read as text though its type is text."""
    from antlr4 import CommonTokenStream, InputStream
    from hydra.grammar.gen.OverrideLexer import OverrideLexer
    from hydra.grammar.gen.OverrideParser import OverrideParser

    value = OverrideParser(CommonTokenStream(OverrideLexer(InputStream(argument)))).override().value()
    if value is None:
        return argument
    sweep = value.simpleChoiceSweep()
    elements = [value.element()] if sweep is None else sweep.element()
    for start, stop in sorted((place for element in elements for place in _places(element, kind)), reverse=True):
        argument = f"{argument[:start]}'{argument[start:stop]}'{argument[stop:]}"
    return argument


def _places(element: Any, kind: Any) -> Iterator[tuple[int, int]]:
    """From and to where text stands in an override that Hydra would read as a number, a truth value or null."""
    from hydra.grammar.gen.OverrideLexer import OverrideLexer

    members = {_origin(member): member for member in _members(kind)}
    if element.primitive() is not None and str in members:
        tokens = [node.symbol for node in element.primitive().getChildren() if node.symbol.type != OverrideLexer.WS]
        others = {OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL}
        others |= set() if type(None) in members else {OverrideLexer.NULL}
        if len(tokens) == 1 and tokens[0].type in others:
            yield tokens[0].start, tokens[0].stop + 1
    elif element.listContainer() is not None and list in members:
        for child in element.listContainer().element():
            yield from _places(child, (typing.get_args(members[list]) or (Any,))[0])
    elif element.dictContainer() is not None:
        for pair in element.dictContainer().dictKeyValuePair():
            yield from _places(pair.element(), _child_kind(kind, pair.dictKey().getText()))
    elif element.function() is not None and element.function().ID().getText() not in CASTS:
        for child in element.function().element():
            yield from _places(child, kind)


def _check(name: str, kind: Any, value: Any, text: str) -> None:
    """UserError unless the value, typed as `text`, fits the type."""
    members = _members(kind)
    if kind is None or Any in members or _is_later(value) or (value is None and type(None) in members):
        return
    origins = {_origin(member): member for member in members if member is not type(None)}
    section = next((member for member in members if dataclasses.is_dataclass(member)), None)
    if isinstance(value, dict) and (section is not None or dict in origins):
        for key, inner in value.items():
            inner_kind = _child_kind(kind, str(key))
            if inner_kind is None:
                assert section is not None
                names = [field.name for field in dataclasses.fields(section)]  # type: ignore[arg-type]
                hint = nearest(str(key), names, otherwise=f"there are {', '.join(names)}")
                raise UserError(f"{name}={text}: no such option as {key}; {hint}")
            _check(f"{name}.{key}", inner_kind, inner, str(inner))
    elif isinstance(value, list) and list in origins:
        inner_kind = (typing.get_args(origins[list]) or (Any,))[0]
        for place, inner in enumerate(value):
            if dataclasses.is_dataclass(inner_kind) and not isinstance(inner, dict):
                raise UserError(f"{name}={text}: must be {_wanted(name, kind, value, str(inner))}")
            _check(f"{name}[{place}]", inner_kind, inner, str(inner))
    elif isinstance(value, dict | list) or not any(_converts(member, value) for member in origins):
        raise UserError(f"{name}={text}: must be {_wanted(name, kind, value, text)}")


def _is_later(value: Any) -> bool:
    """Whether the value is known only when everything else is: an interpolation, or left out."""
    return isinstance(value, str) and ("${" in value or value == "???")


def _converts(kind: Any, value: Any) -> bool:
    """Whether OmegaConf would make this type out of the value, neither a list nor a mapping."""
    if kind is str:
        return value is not None
    try:
        return kind in NODES and NODES[kind](value=value, is_optional=False) is not None
    except ValidationError:
        return False


def _wanted(name: str, kind: Any, value: Any, text: str) -> str:
    """What would have been right, and how to write it."""
    members = [member for member in _members(kind) if member is not type(None)]
    null = ", or null" if type(None) in _members(kind) else ""
    first = members[0]
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return f"given option by option, like {name}.{names[0]}=VALUE"
    if _origin(first) is dict:
        return "a mapping, like " + shlex.quote(f"{name}={{NAME: VALUE}}")
    if _origin(first) is list:
        return "a list, like " + shlex.quote(f"{name}={_example(first, text)}") + null
    if first is str:
        return "text, like " + shlex.quote(f"{name}={_example(first, text)}") + null
    if first is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return f"a whole number, like {name}={int(value)}{null}"
    unit = re.fullmatch(r"([0-9.]+) ?([kmbgt])", text.lower()) if first is float else None
    example = f", like {name}={unit[1]}e{UNITS[unit[2]]}" if unit else ""
    return f"{WANTED.get(first, 'of another type')}{example}{null}"


def _quoted_form(name: str, kind: Any, text: str) -> str:
    """How to write what Hydra cannot read, or reads as something else."""
    members = [member for member in _members(kind) if member is not type(None)]
    example = _example(members[0], text)
    if example == text:
        return f"cannot be read as {WANTED.get(members[0], 'a value')}"
    return f"has characters of Hydra's syntax; as text it is given in quotes, like {shlex.quote(f'{name}={example}')}"


def _example(kind: Any, text: str) -> str:
    """The text as a value of the type."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if _origin(kind) is list:
        inner = text[1:-1].strip() if text.startswith("[") and text.endswith("]") else text
        return f"[{_example((typing.get_args(kind) or (Any,))[0], inner)}]"
    if dataclasses.is_dataclass(kind):
        if text.startswith("{"):  # where in it the fault is, nobody knows
            return f'{{{dataclasses.fields(kind)[0].name}: "VALUE"}}'
        return f"{{{dataclasses.fields(kind)[0].name}: {text if _is_plain(text) else _example(str, text)}}}"
    if kind is str or kind is Any:
        return QuotedString(text, Quote.double).with_quotes()
    return text


def _is_plain(text: str) -> bool:
    return bool(text) and not set(text) & set("\\()[]{}:=, \t'\"$")


def explain(error: BaseException) -> str:
    """What Hydra or OmegaConf found wrong with a configuration, on one line and without their advice."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    text = " ".join(str(error).split())
    where = text.partition("'")[2].partition("'")[0] + ".yaml: " if text.startswith("In '") else ""
    for one in chain:
        if isinstance(one, OmegaConfBaseException):
            said = (one.msg or str(one)).split("\n    full_key")[0]
            name = f"{one.full_key}: " if one.full_key else ""
            escape = "; the text ${ is written \\${, in quotes" if isinstance(one, InterpolationResolutionError) else ""
            return f"{where}{name}{' '.join(said.split())}{escape}"
    return re.split(r" (?:See https://|(?:Config s|S)earch path:|To append to )", text)[0]
