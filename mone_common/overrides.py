"""Read command-line overrides by the declared types of the options.

    overrides = read_overrides(hydra, "pretrain", ["run.name=2024_10_01", "model=mone_small"], sweep=False)
    -> ["run.name='2024_10_01'", "model=mone_small"]

Hydra infers the type of a value from its text: 2024_10_01 is the number 20241001. This module uses the type of the option: a
number, truth value or null for an option of type text is quoted, also in lists, mappings and sweeps. An invalid value is a
one-line UserError that names the option, its value and what would be valid.
"""

import functools
import re
import shlex
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from mone_common.console import UserError
from mone_common.option_types import (
    WANTED,
    check_value,
    child_kind,
    declared,
    example_of,
    members_of,
    nearest,
    option_names,
    origin_of,
    within_mapping,
)
from mone_common.secrets import masked
from mone_common.text import printable

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override

Result = TypeVar("Result")

NO_SWEEP = ("run.name", "run.dir")
"""Options that are set for each point of a sweep."""
CASTS = ("int", "float", "bool", "str", "json_str")


def read_overrides(hydra: "Hydra", config_name: str, arguments: list[str], *, sweep: bool) -> list[str]:
    """The overrides, quoted for Hydra.

    sweep: whether values separated by commas are the points of a sweep.
    Raises UserError for invalid syntax, an unknown option, group or choice, and a value of the wrong type.
    """
    from hydra.core.object_type import ObjectType
    from hydra.types import RunMode

    loader = hydra.config_loader
    parsed = {argument: _safely(argument, _parse) for argument in arguments}
    found = [argument for argument, override in parsed.items() if override and override.key_or_group == "hydra.searchpath"]

    @functools.cache
    def repository() -> Any:
        # As loader.get_group_options, which copies all sources of configuration in each call.
        return loader._parse_overrides_and_create_caching_repo(config_name, found)[1]  # type: ignore[attr-defined]

    @functools.cache
    def choices(group: str) -> list[str]:
        inner = repository().get_group_options(group, ObjectType.GROUP) if group else []
        nested = [f"{name}/{choice}" for name in inner for choice in choices(f"{group}/{name}")]
        return [*repository().get_group_options(group, ObjectType.CONFIG), *nested]

    def compose(overrides: list[str]) -> DictConfig:
        return hydra.compose_config(config_name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=False)

    # The choices of groups determine which options exist, for example those of a launcher.
    groups = {argument: override for argument, override in parsed.items() if override and choices(override.key_or_group)}
    known: list[str] = []
    if groups:
        own = compose(found)
        known = list(own.hydra.runtime.choices)
        # A folder of configuration files is a group of some commands; other commands may have an option of that name.
        others = {override.key_or_group for override in groups.values() if override.key_or_group not in known}
        if options := frozenset(name for name in others if name and declared(own, name) is not None):
            groups = {argument: override for argument, override in groups.items() if override.key_or_group not in options}
            _hide_groups(loader, options)
    chosen = [_safely(argument, lambda text: _read_group(text, loader, choices, known)) for argument in groups]
    first = [f"{override.get_key_element()}={_points(override)[0]}" for _, override in chosen if not override.is_delete()]
    config = compose([*found, *first])
    read = dict(zip(groups, (text for text, _ in chosen), strict=True))
    for argument in parsed:
        if argument not in groups:
            read[argument] = _read_safely(argument, config, sweep=sweep)
    return [read[argument] for argument in arguments]


def _hide_groups(loader: Any, names: frozenset[str]) -> None:
    """Make Hydra read overrides of these names as options; it reads every name with a folder as a group."""
    from hydra._internal.config_repository import ConfigRepository

    class Repository(ConfigRepository):
        def group_exists(self, config_path: str) -> bool:
            return config_path not in names and super().group_exists(config_path)

    loader.repository = Repository(loader.config_search_path)


def read_sweep_params(config: DictConfig) -> list[str]:
    """Overrides for values of hydra.sweeper.params that must be quoted for Hydra."""
    from hydra.core.override_parser.types import Quote, QuotedString

    changed = []
    for name, values in (OmegaConf.to_container(config.hydra.sweeper).get("params") or {}).items():  # type: ignore[union-attr]
        if name in config.hydra.runtime.choices:
            continue
        if declared(config, name) is None:
            raise UserError(f"hydra.sweeper.params: {name}: no such option; {nearest(name, option_names(config))}")
        argument = f"{name}={values}"
        read = _read_safely(argument, config, sweep=True)
        if read != argument:
            value = QuotedString(read.partition("=")[2], Quote.double).with_quotes()
            changed.append(f"hydra.sweeper.params={{{name}: {value}}}")
    return changed


def check_files(hydra: "Hydra", config_name: str, overrides: list[str], config: DictConfig) -> None:
    """UserError for a number or truth value in a configuration file if the option has type text.

    YAML reads 24:00:00 as the number 86400, and the original text cannot be recovered.
    """
    from hydra.types import RunMode

    loader = hydra.config_loader
    for default in loader.compute_defaults_list(config_name, overrides, RunMode.MULTIRUN).defaults:
        path = default.config_path
        found = loader.repository.load_config(path) if path else None  # type: ignore[attr-defined]
        if found is None or found.is_schema_source or path.startswith("hydra/"):
            continue
        values = OmegaConf.to_container(found.config)
        package = default.package or ""
        for name, value in _numbers_for_text(declared(config, package) if package else OmegaConf.get_type(config), values):
            name = f"{package}.{name}".lstrip(".")
            raise UserError(f"{path}.yaml: {name} is read as {value!r}; put the text in quotes")


def _numbers_for_text(kind: Any, value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and truth values within a value of this type that should be text."""
    members = {origin_of(member): member for member in members_of(kind)}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers_for_text(child_kind(kind, str(key)), inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and list in members:
        for place, inner in enumerate(value):
            yield from _numbers_for_text((typing.get_args(members[list]) or (Any,))[0], inner, f"{name}[{place}]")
    elif str in members and isinstance(value, int | float):
        yield name, value


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


def _safely(argument: str, read: Callable[[str], Result], *, secret: bool = True) -> Result:
    """`read(argument)`; its UserError is printable and shows no values of secret names."""
    hidden = masked(argument) if secret else argument
    try:
        return read(argument)
    except UserError as error:
        if hidden == argument:
            raise UserError(printable(error)) from None
    try:
        read(hidden)  # raises the same error without the value
    except UserError as error:
        raise UserError(printable(error)) from None
    raise UserError(printable(f"{hidden}: its value cannot be read; give one text, in quotes"))


def _read_safely(argument: str, config: DictConfig, *, sweep: bool) -> str:
    kind = declared(config, argument.partition("=")[0].lstrip("+~").strip())
    numbers = kind is not None and set(members_of(kind)) <= {int, float, bool, type(None)}
    return _safely(argument, lambda text: _read_option(text, _parse(text), config, sweep=sweep), secret=not numbers)


def _read_group(argument: str, loader: Any, choices: Any, known: list[str]) -> "tuple[str, Override]":
    """An override that chooses from a group of configuration files; the choice is read as text."""
    override = _parse(argument)
    assert override is not None
    group = override.key_or_group
    if override.is_delete() or override.package is not None:
        return argument, override
    if group not in known or not group:
        raise UserError(f"{argument}: this command has no such option; see --help")
    argument = argument.lstrip("+")
    text = _edited(argument, str)
    override = _parse(text)
    assert override is not None
    override.config_loader = loader  # needed by glob(...)
    there = choices(group)
    points = _points(override)
    if override.is_sweep_override() and group.startswith("hydra/"):
        raise UserError(f"{argument}: a sweep cannot vary {group}, which does not change what is trained: give it one value")
    if not points:
        raise UserError(f"{argument}: none of {', '.join(there)} fits")
    for choice in [one for point in points for one in (point if isinstance(point, list) else [point])]:
        if choice not in there:
            hint = nearest(str(choice), there, otherwise="")
            raise UserError(f"{group}={choice}: no such choice; choose from {', '.join(there)}{'; ' * bool(hint)}{hint}")
    return text, override


def _points(override: "Override") -> list[Any]:
    """The values of a sweep, or a list of the single value."""
    from hydra.core.override_parser.types import Override

    if override.is_discrete_sweep():
        return [Override._convert_value(value) for value in override.sweep_iterator()]
    return [override.value()]


def _read_option(argument: str, override: "Override | None", config: DictConfig, *, sweep: bool) -> str:
    """Check one override of an option and add quotes where Hydra would not read text as text."""
    from hydra.core.override_parser.types import Quote, QuotedString, ValueType

    key, _, text = argument.partition("=")
    name = override.key_or_group if override is not None else key.lstrip("+~").strip()
    kind, within = declared(config, name), within_mapping(config, name)
    if name == "hydra.mode":
        raise UserError(f"{argument}: --multirun on the command line starts a sweep, and nothing else does")
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
    if override.is_sweep_override() and (name in NO_SWEEP or name.startswith("hydra.")):
        raise UserError(f"{argument}: a sweep cannot vary {name}, which does not change what is trained: give it one value")
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        raise UserError(
            f"{argument}: glob() chooses among configuration files; give the values of an option one by one, like 1,2"
        )
    if str in members_of(kind) and text != text.strip() and isinstance(override._value, str | int | float):
        argument = f"{name}={QuotedString(text, Quote.double).with_quotes()}"  # keeps leading and trailing spaces
    argument = f"{name}={_edited(argument, kind).partition('=')[2]}"
    edited = _parse(argument)
    assert edited is not None
    for point in _points(edited) if edited.is_discrete_sweep() or not edited.is_sweep_override() else []:
        check_value(name, kind, point, text)
    # Hydra refuses new keys in mappings without ++.
    return f"++{argument}" if within or dict in map(origin_of, members_of(kind)) else argument


def _edited(argument: str, kind: Any) -> str:
    """The override with quotes around values of type text that Hydra would read as another type."""
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
    """Start and end of values of type text in an override that Hydra would read as a number, truth value or null."""
    from hydra.grammar.gen.OverrideLexer import OverrideLexer

    members = {origin_of(member): member for member in members_of(kind)}
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
            yield from _places(pair.element(), child_kind(kind, pair.dictKey().getText()))
    elif element.function() is not None and element.function().ID().getText() not in CASTS:
        for child in element.function().element():
            yield from _places(child, kind)


def _quoted_form(name: str, kind: Any, text: str) -> str:
    """How to quote a value that Hydra cannot read, or reads as something else."""
    members = [member for member in members_of(kind) if member is not type(None)]
    example = example_of(members[0], text)
    if example == text:
        return f"cannot be read as {WANTED.get(members[0], 'a value')}"
    return f"has characters of Hydra's syntax; as text it is given in quotes, like {shlex.quote(f'{name}={example}')}"


def explain(error: BaseException) -> str:
    """An error of Hydra or OmegaConf on one line, without their advice."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    text = " ".join(str(error).split())
    where = text.partition("'")[2].partition("'")[0] + ".yaml: " if text.startswith("In '") else ""
    for one in chain:
        if isinstance(one, OmegaConfBaseException):
            message = (one.msg or str(one)).split("\n    full_key")[0]
            name = f"{one.full_key}: " if one.full_key else ""
            escape = "; the text ${ is written \\${, in quotes" if isinstance(one, InterpolationResolutionError) else ""
            return printable(f"{where}{name}{' '.join(message.split())}{escape}")
    return re.split(r" (?:See https://|(?:Config s|S)earch path:|To append to )", text)[0]
