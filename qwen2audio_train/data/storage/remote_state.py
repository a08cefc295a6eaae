"""What a server tells of the state of a file, and whether two answers speak of the same one."""

from __future__ import annotations

from email.message import Message
from typing import TypeAlias

State: TypeAlias = list[str | None]
"""ETag, time of the last change and length of a file, as far as its server tells them."""

UNTOLD: State = [None, None, None]


def told_by(headers: Message) -> State:
    """The state that an answer's headers tell; of a part of a file, too."""
    part = headers.get("Content-Range")
    length = headers.get("Content-Length") if part is None else part.rpartition("/")[2].replace("*", "") or None
    return [headers.get("ETag"), headers.get("Last-Modified"), length]


def is_another(first: State, second: State) -> bool:
    """Whether two answers speak of different files: of other lengths, or with neither ETag nor time in common.

    Servers behind one address may make up ETags or times of their own for the same file.
    """
    *marks, length = zip(first, second, strict=True)
    told = [a == b for a, b in marks if a and b]
    return (None not in length and length[0] != length[1]) or (bool(told) and not any(told))
