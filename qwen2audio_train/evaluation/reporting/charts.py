"""Charts as inline SVG. Colours are CSS variables of the page, so that one drawing serves light and dark."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

HELD_OUT = 4
"""Colour of a curve over held-out data, after those of the stages."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 16, 12, 34


@dataclass(frozen=True)
class Line:
    """A curve; `colour` counts the page's series colours, `faint` is for raw values behind a smoothed curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Dot:
    """A value with its interval in a row of a dot chart."""

    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0
    title: str = ""


@dataclass(frozen=True)
class DotRow:
    """A row of a dot chart; `marks` are reference values with their names, drawn as ticks."""

    label: str
    dots: Sequence[Dot]
    marks: Sequence[tuple[str, float]] = field(default_factory=tuple)


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_range: tuple[float, float] | None = None,
    unit: float = 1.0,
    guide: float | None = None,
    size: tuple[int, int] = (380, 220),
) -> str:
    """Curves over a common x axis that starts at 0; values are shown times `unit`, `guide` is a dashed level."""
    drawn = [line for line in lines if len(line.x)]
    if not drawn:
        return ""
    width, height = size
    ys = [y for line in drawn for y in line.y if math.isfinite(y)]
    low, high = y_range or _padded(ys if guide is None else [*ys, guide])
    x_max = max(max(line.x) for line in drawn) or 1.0
    place_x = _scale(0.0, x_max, _LEFT, width - _RIGHT)
    place_y = _scale(low, high, height - _BOTTOM, _TOP)
    parts = [_y_axis(ticks(low, high), place_y, width, unit)]
    for value in ticks(0.0, x_max):
        parts.append(_text(place_x(value), height - _BOTTOM + 15, _number(value), "middle"))
    parts.append(_text((_LEFT + width - _RIGHT) / 2, height - 4, x_label, "middle"))
    if guide is not None:
        parts.append(f'<path class="guide" d="M{_LEFT} {place_y(guide):.1f}H{width - _RIGHT}"/>')
    for line in drawn:
        inside = [
            (place_x(x), place_y(min(max(y, low), high)))
            for x, y in zip(line.x, line.y, strict=True)
            if math.isfinite(y)
        ]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in inside)
        parts.append(f'<path class="line c{line.colour}{" faint" if line.faint else ""}" d="{path}"/>')
    names = ", ".join(line.name for line in drawn if not line.faint)
    return _svg(width, height, parts, names)


def dot_chart(rows: Sequence[DotRow], *, x_max: float, unit: float = 100.0, label_width: int = 215) -> str:
    """Values with intervals, one row per label, on an x axis from 0 to `x_max`; values are shown times `unit`."""
    step, width = 30, 1120
    height = _TOP + step * len(rows) + 22
    place = _scale(0.0, x_max, label_width, width - _RIGHT - 8)
    bottom = _TOP + step * len(rows)
    parts = []
    for value in ticks(0.0, x_max):
        parts.append(f'<path class="grid" d="M{place(value):.1f} {_TOP}V{bottom}"/>')
        parts.append(_text(place(value), bottom + 16, _number(unit * value), "middle"))
    for index, row in enumerate(rows):
        centre = _TOP + step * (index + 0.5)
        parts.append(_text(label_width - 12, centre + 4, row.label, "end", "label"))
        for name, value in row.marks:
            title = f"<title>{escape(name)} {_number(unit * value)}</title>"
            x = place(min(value, x_max))
            parts.append(f'<path class="mark" d="M{x:.1f} {centre - 10:.1f}v20">{title}</path>')
        for number, dot in enumerate(row.dots):
            y = centre + 7.0 * (number - (len(row.dots) - 1) / 2)
            parts.append(_dot(dot, y, place, x_max))
    return _svg(width, height, parts, ", ".join(row.label for row in rows))


def _dot(dot: Dot, y: float, place: _Scale, x_max: float) -> str:
    title = f"<title>{escape(dot.title)}</title>"
    parts = []
    if dot.low is not None and dot.high is not None:
        left, right = (place(min(value, x_max)) for value in (dot.low, dot.high))
        parts.append(f'<path class="line c{dot.colour}" d="M{left:.1f} {y:.1f}H{right:.1f}"/>')
    x = place(min(dot.value, x_max))
    parts.append(f'<circle class="dot c{dot.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    return f"<g>{title}{''.join(parts)}</g>"


def smoothed(values: Sequence[float], share: float = 0.06) -> list[float]:
    """Centred moving average over `share` of the curve, narrower at its ends."""
    reach = round(share * len(values) / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    width = np.minimum(reach, np.minimum(places, len(values) - 1 - places))
    return list((sums[places + width + 1] - sums[places - width]) / (2 * width + 1))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between two bounds."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def spectrogram_png(mel: np.ndarray) -> str:
    """A log-mel spectrogram (bands, frames) as a data URI: low bands at the bottom, dark to light."""
    low, high = np.quantile(mel, [0.02, 0.995])
    level = np.clip((mel[::-1] - low) / max(high - low, 1e-6), 0.0, 1.0)
    anchors = np.linspace(0.0, 1.0, len(_COLOURS))
    pixels = np.stack([np.interp(level, anchors, channel) for channel in np.array(_COLOURS).T], axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.round(pixels).astype(np.uint8))
    header = struct.pack(">IIBBBBB", mel.shape[1], mel.shape[0], 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


_COLOURS = ((13, 8, 40), (62, 15, 114), (139, 34, 108), (214, 72, 66), (250, 152, 47), (252, 241, 164))
"""From silence to loud."""


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


class _Scale:
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.start = low, start
        self.slope = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) * self.slope


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(low, high, start, end)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    return (0.0 if 0 <= low < 0.4 * high else low - room), high + room


def _y_axis(values: Sequence[float], place: _Scale, width: int, unit: float) -> str:
    parts = []
    for value in values:
        parts.append(f'<path class="grid" d="M{_LEFT} {place(value):.1f}H{width - _RIGHT}"/>')
        parts.append(_text(_LEFT - 7, place(value) + 4, _number(unit * value), "end"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    return f"{round(value, 6):g}"


def _svg(width: int, height: int, parts: Sequence[str], label: str) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{inside}</svg>'
