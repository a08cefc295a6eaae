"""WebM and Matroska by their clusters: whether a file is whole, and the part of it that a slice needs.

What a browser records tells neither its length nor where anything stands, and FFmpeg decodes such a file from its
start for every slice. A cluster (some seconds) with the file's description in front of it is a file of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from qwen2audio_train.data.audio.raw import Bytes, FormatError

EBML, SEGMENT, INFO, TRACKS, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675
TOP = {INFO, TRACKS, CLUSTER, 0x114D9B74, 0x1C53BB6B, 0x1254C367, 0x1941A469, 0x1043A770}
"""The elements of a segment: a cluster of unknown size ends where one of these begins."""
TIMESTAMP, SCALE = 0xE7, 0x2AD7B1
OPEN_SEGMENT = SEGMENT.to_bytes(4, "big") + b"\x01" + 7 * b"\xff"
"""A segment of unknown size."""


class Element(NamedTuple):
    """An element's id, where its body begins and where it ends; None for one of unknown size."""

    id: int
    start: int
    body: int
    end: int | None


@dataclass(frozen=True)
class Clusters:
    """What a file consists of: `head` describes it, `starts` (n + 1) and `times_s` (n) are those of its clusters."""

    head: bytes
    starts: tuple[int, ...]
    times_s: tuple[float, ...]

    def between(self, start_s: float, stop_s: float) -> tuple[int, int]:
        """First and last byte of the clusters that hold a stretch, with one before it for decoders to begin in."""
        first = max(0, bisect_right(self.times_s, start_s) - 2)
        last = max(first + 1, bisect_right(self.times_s, stop_s))
        return self.starts[first], self.starts[last]


def find_clusters(file: Bytes, size: int) -> Clusters:
    """Walk through a file. Raises FormatError where it is cut off, or holds no clusters."""
    head, scale = b"", 1e-3
    starts: list[int] = []
    times_s: list[float] = []
    end = size
    for element in _walk(file, size):
        if element.id in (EBML, INFO, TRACKS):
            head += _bytes(file, element.start, element.end or size)
            head += OPEN_SEGMENT if element.id == EBML else b""
        if element.id == INFO:
            found = [e for e in _children(file, element.body, element.end or size) if e.id == SCALE]
            scale = _number(file, found[0]) / 1e9 if found else scale
        elif element.id == CLUSTER:
            starts.append(element.start)
        elif element.id == TIMESTAMP and len(times_s) < len(starts):
            times_s.append(_number(file, element) * scale)
        elif starts and element.id in TOP:
            end = min(end, element.start)
    if not starts or len(times_s) < len(starts):
        raise FormatError("holds no audio: is it cut off?")
    return Clusters(head, (*starts, end), tuple(times_s))


def _walk(file: Bytes, size: int) -> Iterator[Element]:
    """The elements of a file in order, down to the time of each cluster (to all of it where its size is unknown)."""
    place = 0
    while place < size:
        element = _element(file, place)
        if element is None:
            return
        if element.end is not None and element.end > size:
            raise FormatError(f"is cut off: it should reach to byte {element.end} and has {size}; fetch the file again")
        yield element
        if element.id == SEGMENT or element.end is None:
            place = element.body
            continue
        if element.id == CLUSTER:
            yield from (child for child in _children(file, element.body, element.end) if child.id == TIMESTAMP)
        place = element.end


def _children(file: Bytes, place: int, end: int) -> Iterator[Element]:
    while place < end and (element := _element(file, place)) is not None and element.end is not None:
        yield element
        if element.id == TIMESTAMP:
            return
        place = element.end


def _element(file: Bytes, place: int) -> Element | None:
    """The element at a place; None for what is none, such as zeros after the last one."""
    head = _bytes(file, place, place + 12)
    length = 9 - head[0].bit_length()
    if length > 4:
        return None
    if len(head) <= length or len(head) < length + 9 - head[length].bit_length():
        raise FormatError("is cut off in the middle of an element; fetch the file again")
    width = 9 - head[length].bit_length()
    if width > 8:
        return None
    ones = (1 << 7 * width) - 1
    size = int.from_bytes(head[length : length + width], "big") & ones
    body = place + length + width
    return Element(int.from_bytes(head[:length], "big"), place, body, None if size == ones else body + size)


def _number(file: Bytes, element: Element) -> int:
    return int.from_bytes(_bytes(file, element.body, element.end or element.body), "big")


def _bytes(file: Bytes, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)
