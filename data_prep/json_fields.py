"""Check that the fields of a JSON object have the types of the dataclass that it stores.

for problem in field_problems(Shard, {"name": 3}, {}, "shards.0."): ...    # shards.0.name is 3, must be a text; ...
"""

import reprlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def field_problems(kind: type, content: dict[str, Any], others: dict[str, type | None], prefix: str = "") -> Iterator[str]:
    """Fields of a stored dataclass that are missing, unknown or of another type, one sentence each.

    others: types of fields that are stored otherwise than the dataclass holds them; None for any. prefix: of their names.
    """
    types: dict[str, Any] = {field.name: getattr(field.type, "__origin__", field.type) for field in fields(kind)}
    types |= others
    for name in sorted(content.keys() - types.keys()):
        yield f"{prefix}{reprlib.repr(name)} is no field of it"
    for name, type_ in types.items():
        if type_ is None:
            continue
        if name not in content:
            yield f"{prefix}{name} is missing"
        elif not is_of(content[name], type_):
            yield f"{prefix}{name} is {reprlib.repr(content[name])}, must be {_TYPE_NAMES[type_]}"


def is_of(value: Any, type_: type) -> bool:
    """Whether a JSON value is of a type: true and false are no numbers, a whole number is a number, too."""
    if isinstance(value, bool) or type_ is bool:
        return isinstance(value, bool) and type_ is bool
    return isinstance(value, int | float if type_ is float else type_)
