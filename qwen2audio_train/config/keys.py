"""What is known of the keys of a schema, such as `data.sources.librispeech.path`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from qwen2audio_train.config.bounds import inner_type

_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", re.MULTILINE)
_WORDS = {str: "text", int: "integer", float: "number", bool: "true | false"}


def type_at(schema: object, key: str) -> Any:
    """Type of a dotted key (`X` of `X | None`), or None where the schema has no such key or leaves it open."""
    found = inner_type(schema)
    for name in key.split("."):
        if dataclasses.is_dataclass(found):
            found = inner_type(get_type_hints(found).get(name))
        elif get_origin(found) is dict:
            found = inner_type(get_args(found)[1])
        else:
            return None
    return found


class Key(NamedTuple):
    """What is known of a key: its dotted name, and its type, default and meaning in words."""

    name: str
    type: str
    default: str
    meaning: str


def keys_of(schema: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a schema with what is below it; `<name>` stands for the names of a mapping.

    Meanings come from the section `Attributes:` of the dataclass's docstring.
    """
    hints, meant = get_type_hints(schema), meanings(schema)
    for field in dataclasses.fields(schema):
        kind = inner_type(hints[field.name])
        name = f"{prefix}{field.name}"
        yield Key(name, _type_in_words(kind, field.metadata), _default_in_words(field), meant.get(field.name, ""))
        if get_origin(kind) is dict and dataclasses.is_dataclass(get_args(kind)[1]):
            yield from keys_of(get_args(kind)[1], f"{name}.<name>.")
        elif dataclasses.is_dataclass(kind):
            yield from keys_of(kind, f"{name}.")


def meanings(schema: object) -> dict[str, str]:
    """Field -> its entry in the section `Attributes:`, where several fields may share one."""
    section = (inspect.getdoc(schema) or "").partition("\nAttributes:\n")[2]
    found: dict[str, str] = {}
    for names, text in _ENTRY.findall(section):
        found |= {name: " ".join(text.split()) for name in names.split(", ")}
    return found


def _type_in_words(kind: Any, demands: Mapping[str, Any]) -> str:
    choices = " | ".join(demands.get("choices", ()))
    if get_origin(kind) is dict:
        words = f"{choices or 'name'}: {_type_in_words(get_args(kind)[1], {})}"
    elif get_origin(kind) is list:
        words = f"list of {choices or _type_in_words(get_args(kind)[0], {})}"
    elif isinstance(kind, type) and issubclass(kind, Enum):
        words = " | ".join(kind.__members__)
    else:
        words = choices or ("keys" if dataclasses.is_dataclass(kind) else _WORDS.get(kind, "value"))
    least, most = demands.get("least"), demands.get("most")
    if least is None:
        return words
    return f"{words}, {least} or more" if most is None else f"{words}, {least} to {most}"


def _default_in_words(field: dataclasses.Field[Any]) -> str:
    if "default" in field.metadata:
        return str(field.metadata["default"])
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING or value == "???":
        return "required"
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    return "unset" if value is None else str(value).replace("'", "") or '""'
