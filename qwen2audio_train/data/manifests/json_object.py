"""One JSON object of a manifest under inspection: complaints name file, line, field, what was expected and found."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from qwen2audio_train.errors import ExampleError, writable

LONGEST_S = 100_000
"""Bound on all times, a little over a day: no clip is that long, and lengths are planned from what is written here."""


BLANKS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and signs by their category that are drawn as nothing: Hangul fillers, the empty Braille pattern."""


class ManifestError(ExampleError):
    """One bad line of a manifest: where it is, what was expected there, and what was found."""

    def __init__(self, file: str, line: int, field: str, expected: str, found: str):
        file, field, expected, found = map(writable, (file, field, expected, found))
        super().__init__(file, line, field, expected, found)
        self.file, self.line, self.field, self.expected, self.found = file, line, field, expected, found

    def __str__(self) -> str:
        at = f' field "{self.field}":' if self.field else ""
        return f"{self.file}:{self.line}:{at} expected {self.expected}, found {self.found}"


class _Missing:
    """Stands for the value of an absent key."""


@dataclass(frozen=True)
class Record:
    """A JSON object, the line that it comes from, and the path of fields that leads to it."""

    values: Mapping[str, Any]
    file: str
    line: int
    prefix: str = ""

    def get(self, key: str) -> Any:
        """The value, None where the key is absent."""
        return self.values.get(key)

    def error(self, key: str, expected: str, found: Any = None) -> ManifestError:
        """What is wrong with a key; `found` describes it in words, by default its value does."""
        shown = found if found is not None else _shown(self.values.get(key, _Missing))
        return ManifestError(self.file, self.line, self.prefix + key, expected, shown)

    def child(self, key: str, value: Any, expected: str) -> Record:
        """The object `value` below `key`."""
        if not isinstance(value, dict):
            raise ManifestError(self.file, self.line, self.prefix + key, expected, _shown(value))
        return Record(value, self.file, self.line, f"{self.prefix}{key}.")

    def check_keys(self, known: Sequence[str]) -> None:
        """Refuse a key that is not known, with the nearest one that is."""
        for key in self.values:
            if key not in known:
                expected = f"one of {', '.join(known)}{_nearest(key, known)}"
                raise self.error(key, expected, "an unknown key")

    def text(self, key: str) -> str:
        """Non-empty text."""
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(key, "non-empty text")
        if value.isascii() and value.isprintable():  # by far the most, in a tenth of the time of what follows
            return value
        try:
            value.encode()
        except UnicodeEncodeError:
            found = "half of a surrogate pair: a name or text that is not UTF-8"
            raise self.error(key, "valid Unicode text", found) from None
        if "\0" in value:
            raise self.error(key, "text", "a zero byte: is it a damaged file, or UTF-16?")
        if not is_visible(value):
            raise self.error(key, "text that can be seen", "spaces and invisible characters alone")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.get(key) is None else self.text(key)

    def choice(self, key: str, known: Sequence[str]) -> str:
        """One of the known words."""
        value = self.get(key)
        if isinstance(value, str) and value in known:
            return value
        raise self.error(key, f"one of {', '.join(known)}{_nearest(value, known)}")

    def seconds(self, key: str, at_least: float) -> float | None:
        """A number of seconds, None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not at_least <= value <= LONGEST_S:
            raise self.error(key, f"a number of seconds, at least {at_least:g} and at most {LONGEST_S}")
        return float(value)

    def items(self, key: str, expected: str) -> list[Any]:
        """A non-empty list."""
        value = self.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, expected)
        return value


def load_record(text: str | bytes, file: str, line: int) -> Record:
    """The JSON object that a line holds. Raises ManifestError for anything else, duplicate keys and NaN included."""

    def error(found: str) -> ManifestError:
        return ManifestError(file, line, "", "one JSON object per line", found)

    try:
        # a mark of the byte order may begin any line: that of a file, or of one that was appended to another
        decoded = (text.decode() if isinstance(text, bytes) else text).removeprefix("\ufeff")
        values = _DECODER.decode(decoded)
    except UnicodeDecodeError as problem:
        raise error(f"byte {problem.object[problem.start]:#04x}, which is not UTF-8") from None
    except json.JSONDecodeError as problem:
        cut_off = "" if decoded.endswith("\n") else " (the line has no line end: is the file cut off?)"
        raise error(f"{problem.msg} at column {problem.colno}{cut_off}") from None
    except (ValueError, RecursionError) as problem:
        huge = "a number of thousands of digits: put it into quotes if it is text"
        raise error(huge if "integer string conversion" in str(problem) else str(problem)) from None
    return as_record(values, file, line)


def as_record(values: Any, file: str, line: int) -> Record:
    """The object `values` as a record. Raises ManifestError for anything else."""
    if not isinstance(values, dict):
        raise ManifestError(file, line, "", "one JSON object per line", _shown(values))
    return Record(values, file, line)


def is_visible(text: str) -> bool:
    """Whether a text has a character that can be seen: no space, no zero-width or control character, no filler."""
    return any(
        char.isprintable() and not char.isspace() and char not in BLANKS and unicodedata.category(char)[0] != "M"
        for char in text
    )


def _nearest(value: Any, known: Sequence[str]) -> str:
    near = get_close_matches(value, known, n=1) if isinstance(value, str) else []
    return f' (did you mean "{near[0]}"?)' if near else ""


def _shown(value: Any) -> str:
    if value is _Missing:
        return "no such key"
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 60 else value[:57] + "...", ensure_ascii=False)
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(value) or '(none)'}"
    return f"a list of {len(value)}" if isinstance(value, list) else json.dumps(value, default=repr)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(key for key in keys if keys.count(key) > 1)}" twice')
    return record


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which is no JSON number")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text}, which is beyond the numbers that there are: put it into quotes if it is text")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
