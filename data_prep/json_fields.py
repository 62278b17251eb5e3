"""Checks the fields of a JSON object against the types of a dataclass.

for problem in field_problems(Shard, {"name": 3}, {}, "shards.0."): ...    # shards.0.name is 3, must be a string; ...
"""

import reprlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def field_problems(kind: type, content: dict[str, Any], others: dict[str, type | None], prefix: str = "") -> Iterator[str]:
    """Problems of a stored dataclass: missing fields, unknown fields and wrong types, one sentence each.

    others: types of the fields that are stored in another form than in the dataclass; None accepts any type.
    prefix: text before each name.
    """
    types: dict[str, Any] = {field.name: getattr(field.type, "__origin__", field.type) for field in fields(kind)}
    types |= others
    for name in sorted(content.keys() - types.keys()):
        yield f"{prefix}{reprlib.repr(name)} is not a known field"
    for name, type_ in types.items():
        if type_ is None:
            continue
        if name not in content:
            yield f"{prefix}{name} is missing"
        elif not is_of(content[name], type_):
            yield f"{prefix}{name} is {reprlib.repr(content[name])}, must be {_TYPE_NAMES[type_]}"


def is_of(value: Any, type_: type) -> bool:
    """Whether a JSON value has a type: an integer is also a float, a boolean is neither."""
    if isinstance(value, bool) or type_ is bool:
        return isinstance(value, bool) and type_ is bool
    return isinstance(value, int | float if type_ is float else type_)
