"""Times of a manifest line: `"spans": [[0.32, 0.61, "hello"], [0.75, 1.10, "world"]]`, in seconds of the clip."""

from __future__ import annotations

from typing import Any

from qwen2audio_train.data.examples import Span
from qwen2audio_train.data.manifests.json_object import Record

SHAPE = "[start_s, end_s, text] with 0 <= start_s <= end_s, and a text without < and >"

SLACK_S = 0.05
"""By which a span may end after its clip: aligners work in frames of 10 to 40 ms."""


def spans_of(record: Record, key: str, duration_s: float | None) -> tuple[Span, ...]:
    """The spans below `key` in the order of their starts; none where there is no such key.

    Raises:
        ManifestError: one of another shape, out of order, or beyond the end of the clip.
    """
    if record.get(key) is None:
        return ()
    spans = [
        _span(record, f"{key}[{number}]", value)
        for number, value in enumerate(record.items(key, f"a non-empty list of {SHAPE}"))
    ]
    for number, span in enumerate(spans):
        if number and span.start_s < spans[number - 1].start_s:
            expected = "spans in the order of their starts"
            raise record.error(
                f"{key}[{number}]", expected, f"{span.start_s:g} s after {spans[number - 1].start_s:g} s"
            )
        if duration_s is not None and span.end_s > duration_s + SLACK_S:
            raise record.error(f"{key}[{number}]", f"an end within the clip's {duration_s:g} s", f"{span.end_s:g} s")
    return tuple(spans)


def _span(record: Record, place: str, value: Any) -> Span:
    if not isinstance(value, list) or len(value) != 3:
        raise record.error(place, SHAPE, repr(value))
    start, end, text = value
    are_numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (start, end))
    is_text = isinstance(text, str) and text.strip() and not set("<>") & set(text)
    if not are_numbers or not is_text or not 0 <= start <= end:
        raise record.error(place, SHAPE, repr(value))
    return Span(float(start), float(end), text.strip())
