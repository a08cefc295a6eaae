"""The length of FLAC files whose header leaves it open: their last frame knows (RFC 9639)."""

from __future__ import annotations

import io
from functools import cache

from qwen2audio_train.data.audio.raw import Bytes, FormatError, Patch, mended

LONGEST_FRAME = 2**18
"""Bytes at a file's end that are searched for its last frame."""
MOST_TRIES = 3
"""What looks like the head of a frame may stand within one, in one file of 3 000."""


def with_flac_length(data: bytes) -> bytes:
    """A FLAC file that tells how many samples it holds. Raises FormatError where it does not and is cut off."""
    told = int.from_bytes(data[21:26], "big") & 0xFFFFFFFFF
    return data if told else mended(data, flac_patch(io.BytesIO(data), len(data), data[:64]))


def flac_patch(file: Bytes, size: int, head: bytes) -> Patch | None:
    """The number of samples for a FLAC file that was written into a pipe and does not tell it: from its last frame.

    Raises:
        FormatError: the last frame is not whole.
    """
    if len(head) < 42:
        raise FormatError("is cut off within its header; fetch or write the file again")
    if int.from_bytes(head[21:26], "big") & 0xFFFFFFFFF:
        return None
    file.seek(max(0, size - LONGEST_FRAME))
    end = _flac_end(file.read(LONGEST_FRAME), head)
    return 21, ((head[21] >> 4 << 36) | end).to_bytes(5, "big")


def _flac_end(tail: bytes, head: bytes) -> int:
    """Number of samples up to the end of the last frame. Raises FormatError where that is not whole."""
    tail = tail[:-128] if tail[-128:-125] == b"TAG" else tail
    place, tries = len(tail), 0
    while tries < MOST_TRIES and (place := tail.rfind(b"\xff", 0, place)) >= 0:
        end = _flac_frame_end(tail[place : place + 16], int.from_bytes(head[8:10], "big"))
        if end is not None:
            if not _crc(tail[place:], 16, 0x8005):
                return end
            tries += 1
    raise FormatError("is cut off: its last FLAC frame is not whole; fetch or write the file again")


def _flac_frame_end(frame: bytes, block_size: int) -> int | None:
    """Number of the sample after a frame, from its head; None if these bytes are no such head (RFC 9639, 9.1)."""
    frame = frame.ljust(16, b"\0")  # one of silence alone is shorter
    if frame[1] & 0xFE != 0xF8 or frame[3] & 1:
        return None
    ones = f"{frame[4]:08b}".find("0")
    if ones in (-1, 1) or any(byte >> 6 != 2 for byte in frame[5 : 4 + max(ones, 1)]):
        return None
    number = frame[4] & (0x7F >> ones)
    for byte in frame[5 : 4 + max(ones, 1)]:
        number = number << 6 | byte & 0x3F
    place, code = 4 + max(ones, 1), frame[2] >> 4
    width = {6: 1, 7: 2}.get(code, 0)
    length = {1: 192, **{n: 144 << n for n in range(2, 6)}, **{n: 1 << n for n in range(8, 16)}}.get(code)
    if width:
        length = int.from_bytes(frame[place : place + width], "big") + 1
    place += width + {12: 1, 13: 2, 14: 2}.get(frame[2] & 15, 0)
    if length is None or _crc(frame[: place + 1], 8, 0x07):
        return None
    return (number if frame[1] & 1 else number * block_size) + length


def _crc(data: bytes, bits: int, polynomial: int) -> int:
    """Cyclic redundancy check, most significant bit first, starting from 0: 0 where the data end with their own."""
    table = _crc_table(bits, polynomial)
    value = 0
    for byte in data:
        value = (value << 8 ^ table[(value >> bits - 8 ^ byte) & 0xFF]) & (1 << bits) - 1
    return value


@cache
def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for byte in range(256):
        value = byte << bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 & 1 else 0)
        table.append(value & (1 << bits) - 1)
    return table
