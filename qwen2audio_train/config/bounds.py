"""What a recipe's schema demands beyond types: bounds and choices of its fields, and the words for what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

SECRET = re.compile(r"\$\{oc\.env:[^}]*(?:\$|KEY|TOKEN|SECRET|PASSW|CREDENTIAL)[^}]*", re.IGNORECASE)


def secrets(value: object, key: str = "") -> Iterator[str]:
    """What is wrong with values that would copy a secret of the environment into every file that holds the recipe."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secrets(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from secrets(inner, key)
    elif isinstance(value, str) and (match := SECRET.search(value)):
        yield (
            f"{key}: {match[0]}}} would write a secret into config.yaml and checkpoints; libraries read it from the "
            "environment themselves"
        )


def at_least(least: float, default: float | None, most: float | None = None) -> Any:
    """A dataclass field whose number lies between `least` and `most`; `out_of_bounds` asks for it.

    Fields that hold several values say the same in their metadata: `least`, `most`, and `choices` for the words of a
    list or the keys of a mapping, or for a single word.
    """
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


def processors() -> Any:
    """A dataclass field for so many processes, by default as many as the machine has processors."""
    return dataclasses.field(default=os.cpu_count() or 1, metadata={"default": "number of processors"})


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Hint that ends an error about a misspelt name: the nearest known one, or all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    return f"known here: {', '.join(names)}"


def no_choice(key: str, value: object, choices: Iterable[str]) -> str:
    known = set(choices)
    if value is False and known & {"no", "off"}:
        return f"{key}: YAML reads a bare no or off as false; put it in quotes"
    return f"{key}: {value!r} is no choice; {nearest(str(value), known)}"


def misfits(node: object, schema: object, path: str = "") -> Iterator[str]:
    """Walk plain containers beside their schema and describe every unknown key, wrong container and unknown choice.

    Interpolations and missing values are left to OmegaConf.
    """
    schema = inner_type(schema)
    key = path.removesuffix(".")
    if node is None or (isinstance(node, str) and (node == "???" or "${" in node)):
        return
    if dataclasses.is_dataclass(schema):
        hints = get_type_hints(schema)
        if not isinstance(node, dict):
            yield f"{key}: {node!r} is no group of keys; expected some of {', '.join(sorted(hints))}"
            return
        for name, value in node.items():
            if name in hints:
                yield from misfits(value, hints[name], f"{path}{name}.")
            else:
                yield f"{path}{name}: unknown key; {nearest(str(name), hints, path)}"
    elif get_origin(schema) is dict:
        if not isinstance(node, dict):
            yield f"{key}: {node!r} is no mapping; expected key: value pairs"
            return
        for name, value in node.items():
            yield from misfits(value, get_args(schema)[1], f"{path}{name}.")
    elif get_origin(schema) is list and not isinstance(node, list):
        yield f"{key}: {node!r} is no list; write {key}=[{node}]"
    elif schema is str and isinstance(node, bool | float):
        yield f"{key}: {str(node).lower()} was read as a value, and text is expected; put it in quotes"
    elif isinstance(schema, type) and issubclass(schema, Enum) and str(node) not in schema.__members__:
        yield no_choice(key, node, schema.__members__)


def missing(node: object, path: str = "") -> Iterator[str]:
    """Describe every mandatory value of a plain container that was not given."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from missing(value, f"{path}{name}.")
    elif node == "???":
        key = path.removesuffix(".")
        yield f"{key}: no value was given, and it has no default; set {key}=..."


def inner_type(schema: object) -> Any:
    """`X` of `X | None`."""
    options = [option for option in get_args(schema) if option is not type(None)]
    return options[0] if len(options) == 1 and get_origin(schema) not in (dict, list) else schema


def out_of_bounds(config: Any, path: str = "") -> Iterator[str]:
    """Describe every value of a dataclass object, at any depth, that its field's bounds or choices exclude."""
    for field in dataclasses.fields(config):
        value, key, demands = getattr(config, field.name), f"{path}{field.name}", field.metadata
        named = value if isinstance(value, dict) else {"": value}
        choices = demands.get("choices")
        if choices is not None:
            words = [value] if isinstance(value, str) else value
            yield from (no_choice(key, word, choices) for word in words if word not in choices)
        for name, inner in named.items():
            inner_key = f"{key}.{name}".removesuffix(".")
            if dataclasses.is_dataclass(inner):
                yield from out_of_bounds(inner, f"{inner_key}.")
            else:
                yield from _out_of_range(inner, inner_key, demands)


def _out_of_range(value: Any, key: str, demands: Mapping[str, Any]) -> Iterator[str]:
    least, most = demands.get("least"), demands.get("most")
    for number in value if isinstance(value, list) else [value]:
        yield from too_small(key, number, least)
        if most is not None and number is not None and number > most:
            yield f"{key}: {number} is too large; expected {most} or less"


def too_small(key: str, number: object, least: float | None) -> Iterator[str]:
    """A message when `number` is below `least`; nothing where there is no bound or no number."""
    if least is not None and isinstance(number, (int, float)) and not number >= least:
        yield f"{key}: {number} is too small; expected {least} or more"
