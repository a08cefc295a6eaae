"""Tables as rows: JSON Lines, a JSON array, CSV and TSV, gzipped or not, in UTF-8 or in UTF-16 with its mark.

A row that cannot be read comes as a ManifestError in its place; the rows around it are read.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import IO, Any

from qwen2audio_train.data.manifests.json_object import ManifestError, as_record, load_record

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | ManifestError]]
"""Rows with their numbers, counted from 1: those of the lines where the corpus has lines."""

COMMA, TAB = ",", "\t"
DELIMITERS = {".csv": COMMA, ".tsv": TAB}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (*DELIMITERS, *JSON_SUFFIXES)

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
UTF32_MARKS = {b"\xff\xfe\0\0": "UTF-32LE", b"\0\0\xfe\xff": "UTF-32BE"}
_CELL = r'(?:"(?:[^"]|"")*"|[^",\r\n]*)'
PROPER_ROW = re.compile(rf"{_CELL}(?:,{_CELL})*[\r\n]*")
MOST_LINES = 200
"""Lines that a quoted cell of a CSV may go on for."""


def suffix_of(file: str) -> str:
    """The ending that tells the form of a file, in small letters: `.csv` of `a.CSV.gz`, and of `https://h/a.csv?x`."""
    name = file.split("?")[0] if "://" in file else file
    return Path(name.lower().removesuffix(".gz")).suffix


def open_lines(file: str) -> IO[bytes]:
    """A text file, gzipped or not, as bytes."""
    return gzip.open(file) if file.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def read_table(file: str, shown: str | None = None) -> Rows:
    """A table with its own columns: CSV and TSV begin with a line of names; anything else is JSON.

    Args:
        shown: what the file is called in errors, and what its ending is read from.
    """
    shown = shown or file
    delimiter = DELIMITERS.get(suffix_of(shown))
    if delimiter is not None:
        return _read_cells(file, shown, delimiter)
    return _read_array(file, shown) if _is_array(file) else read_objects(file, shown)


def read_objects(file: str, shown: str | None = None) -> Rows:
    """JSON Lines. Blank lines are passed over."""
    shown = shown or file
    for number, line in _text_lines(file, shown):
        try:
            if isinstance(line, ManifestError):
                yield number, line
            elif line.strip():
                yield number, dict(load_record(line, shown, number).values)
        except ManifestError as error:
            yield number, error


def _is_array(file: str) -> bool:
    """Whether the file is one JSON array."""
    first = next((line for _, line in _text_lines(file, file) if isinstance(line, ManifestError) or line.strip()), "")
    return not isinstance(first, ManifestError) and first.lstrip().startswith("[")


def _read_array(file: str, shown: str) -> Rows:
    """One JSON array of objects, numbered from 1 by their place in it."""
    lines = [line for _, line in _text_lines(file, shown)]
    bad = next((line for line in lines if isinstance(line, ManifestError)), None)
    if bad is not None:
        yield bad.line, bad
        return
    try:
        rows = json.loads("".join(map(str, lines)))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        yield line, ManifestError(shown, line, "", "one JSON array of objects, or JSON Lines", str(error))
        return
    for number, values in enumerate(rows, start=1):
        try:
            yield number, dict(as_record(values, shown, number).values)
        except ManifestError as error:
            yield number, error


def _text_lines(file: str, shown: str) -> Iterator[tuple[int, str | ManifestError]]:
    """The lines of a file with their numbers; what is not UTF-8 is an error that names its byte and the way out."""
    number = 0
    try:
        with open_lines(file) as probe:
            head = probe.read(2**16)
            if utf32 := UTF32_MARKS.get(head[:4]):
                expected = "UTF-8 text (write the file anew: iconv -f UTF-32 -t UTF-8 IN > OUT)"
                yield 1, ManifestError(shown, 1, "", expected, f"the mark of {utf32}")
                return
            utf16, is_mac = head[:2] in UTF16_MARKS, b"\r" in head and b"\n" not in head
        with open_lines(file) as lines:
            if utf16:
                for number, text in enumerate(TextIOWrapper(lines, encoding="utf-16", newline=""), start=1):
                    yield number, text
                return
            # Excel's "CSV (Macintosh)" ends its lines with a carriage return alone
            ended = (line for raw in lines for line in raw.splitlines(keepends=True)) if is_mac else lines
            for number, raw in enumerate(ended, start=1):
                yield number, _decoded(raw, shown, number)
    except UnicodeDecodeError as error:
        yield number + 1, ManifestError(shown, number + 1, "", "UTF-16 as its first bytes say", str(error))
    except (EOFError, OSError, zlib.error) as error:
        if not file.lower().endswith(".gz"):
            raise
        yield number + 1, ManifestError(shown, number + 1, "", "a whole gzip file", str(error))


def _decoded(raw: bytes, shown: str, number: int) -> str | ManifestError:
    try:
        text = raw.decode("utf-8-sig" if raw[:1] == b"\xef" else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {raw[error.start]:#04x} at place {error.start + 1} of the line"
        expected = "UTF-8 text (write the file anew, for example by iconv -f WINDOWS-1252 -t UTF-8)"
        return ManifestError(shown, number, "", expected, found)
    if "\0" in text:
        expected = "UTF-8 text (write the file anew, for example by iconv -f UTF-16LE -t UTF-8)"
        return ManifestError(shown, number, "", expected, "a zero byte: is it UTF-16 without its mark?")
    return text


def _read_cells(file: str, shown: str, delimiter: str) -> Rows:
    """A CSV, where a cell may stand in quotes, or a TSV, where a quotation mark is a character like any other."""
    names: list[str] = []
    for number, cells in _cells(_text_lines(file, shown), shown, delimiter):
        if isinstance(cells, ManifestError):
            yield number, cells
            if not names:
                return
        elif not names:
            names = cells
            if twice := [name for name in names if name.strip() and names.count(name) > 1]:
                yield number, ManifestError(shown, number, twice[0], "column names of their own", f"{len(twice)} alike")
                return
        elif len(cells) == len(names):
            yield number, dict(zip(names, cells, strict=True))
        elif cells:
            yield number, ManifestError(shown, number, "", f"{len(names)} cells", f"{len(cells)}")


def _cells(
    lines: Iterator[tuple[int, str | ManifestError]], shown: str, delimiter: str
) -> Iterator[tuple[int, list[str] | ManifestError]]:
    """The cells of every row, with the line that it starts in.

    A quoted cell of a CSV may go over several lines, but not over a line that is a whole row by itself: there a quote
    was left open, and reading on would put the rows after it into one cell.
    """
    waiting: list[tuple[int, str | ManifestError]] = []
    num_cells = 0
    while item := (waiting.pop(0) if waiting else next(lines, None)):
        number, line = item
        if isinstance(line, ManifestError):
            yield number, line
            continue
        try:
            cells = _split(line, delimiter)
        except csv.Error as error:
            is_open = str(error) == "unexpected end of data"
            joined, taken = _continued(line, waiting, lines, num_cells) if is_open else (None, 0)
            del waiting[:taken]
            if joined is None:
                expected = 'cells of which every quote is closed (double a " within quotes)'
                yield number, ManifestError(shown, number, "", expected, str(error))
                continue
            cells = joined
        num_cells = num_cells or len(cells)
        yield number, cells


def _split(line: str, delimiter: str) -> list[str]:
    """The cells of one line. Raises csv.Error where a quote is left open or a cell is very long."""
    if delimiter == TAB:
        return next(csv.reader([line], delimiter=TAB, quoting=csv.QUOTE_NONE), [])
    return next(csv.reader([line], delimiter=delimiter, strict=True), [])


def _continued(
    line: str,
    waiting: list[tuple[int, str | ManifestError]],
    lines: Iterator[tuple[int, str | ManifestError]],
    num_cells: int,
) -> tuple[list[str] | None, int]:
    """The cells of a row that goes on in the lines after it, and how many those are; None if it does not end.

    Lines that are looked at are put into `waiting`.
    """
    text = line
    for taken in range(MOST_LINES):
        if taken == len(waiting):
            if (item := next(lines, None)) is None:
                return None, 0
            waiting.append(item)
        behind = waiting[taken][1]
        if isinstance(behind, ManifestError) or _is_row(behind, num_cells):
            return None, 0
        text += behind
        if '"' in behind and (cells := _whole(text)) is not None:
            return (cells, taken + 1) if not num_cells or len(cells) == num_cells else (None, 0)
    return None, 0


def _is_row(line: str, num_cells: int) -> bool:
    """Whether a line is a whole row by itself, quotes at the borders of its cells alone."""
    cells = _whole(line) if num_cells > 1 and PROPER_ROW.fullmatch(line) else None
    return cells is not None and len(cells) == num_cells


def _whole(text: str) -> list[str] | None:
    """The cells of a CSV row over one or more lines, None if it does not end with them."""
    try:
        rows: Sequence[list[str]] = list(csv.reader(StringIO(text, newline=""), strict=True))
    except csv.Error:
        return None
    return rows[0] if len(rows) == 1 else None
