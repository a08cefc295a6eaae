"""From a corpus's row to a record of ours: which column is which field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from qwen2audio_train.config.schema import ConfigError

CLIP_FIELDS = ("start_s", "end_s", "channel")
TEXT_FIELDS = ("id", "target", "question")
"""Fields that are text even where the corpus has numbers."""
_ABSENT = object()


def map_row(row: Mapping[str, Any], columns: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, Any]:
    """The object of a manifest line from one row: the constants, and our fields from the row's columns.

    A field `meta.NAME` goes into the object `meta`.
    """
    found = {name: reach(row, column) for name, column in columns.items()}
    record = {**constants, **{name: value for name, value in found.items() if value not in (None, "", _ABSENT)}}
    for name in ("duration_s", *CLIP_FIELDS):
        if isinstance(record.get(name), str):
            record[name] = _number(record[name])
    for name in TEXT_FIELDS:
        if isinstance(record.get(name), int | float) and not isinstance(record[name], bool):
            record[name] = str(record[name])
    if {"start_s", "duration_s"} <= record.keys() and not ({"end_s"} & {*columns, *constants}):
        record |= _end_of(record["start_s"], record["duration_s"])
    if meta := {name.removeprefix("meta."): record.pop(name) for name in [*record] if name.startswith("meta.")}:
        record["meta"] = {**record.get("meta", {}), **meta}
    bounds = {name: record.pop(name) for name in CLIP_FIELDS if name in record}
    return record | ({"audio": {"path": record.get("audio"), **bounds}} if bounds else {})


def reach(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, by its own name or, with dots, inside of an object; a mark of its own for none."""
    if column in row:
        return row[column]
    head, dot, rest = column.partition(".")
    inner = row.get(head) if dot else None
    return reach(inner, rest) if isinstance(inner, Mapping) else _ABSENT


def reaches(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row has a column."""
    return reach(row, column) is not _ABSENT


def columns_of(row: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Names of a row's columns, those inside of objects with dots."""
    names = set()
    for name, value in row.items():
        names.add(prefix + name)
        if isinstance(value, Mapping):
            names |= columns_of(value, f"{prefix}{name}.")
    return names


def check_columns(asked: Mapping[str, str], known: Iterable[str], corpus: str) -> None:
    """Refuse a column that no row has, with the nearest that there is.

    Args:
        asked: key of the recipe -> column.
        known: columns of the rows that were seen; none at all say nothing.
    """
    known = sorted(known)
    for key, column in asked.items():
        if known and column not in known:
            near = get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(map(repr, known))}"
            raise ConfigError(f'{key}: no row of {corpus} has a column "{column}"; {hint}')


def as_text(value: Any) -> str:
    """A value as it is written: a truth value as `true` or `false`, what is absent as nothing."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None or value is _ABSENT else str(value)


def _end_of(start: Any, length: Any) -> dict[str, float]:
    """A start with a length cuts a slice (as in NeMo's manifests): its end, where both are numbers."""
    is_slice = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (start, length))
    return {"end_s": round(start + length, 6)} if is_slice else {}


def _number(text: str) -> float | str:
    """The number that a text cell holds; what is none is left to the parser to refuse."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number
