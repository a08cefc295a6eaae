"""The bytes of a file before a decoder sees them: read, mended, refused."""

from __future__ import annotations

from typing import Protocol, Self

from qwen2audio_train.errors import ExampleError


class Bytes(Protocol):
    """As much of a binary file as is needed here."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def close(self) -> None: ...


Patch = tuple[int, bytes]
"""Bytes that stand in for the file's own from an offset on."""


class FormatError(ExampleError):
    """A file that cannot be read; says why and what to do."""


def mended(data: bytes, patch: Patch | None) -> bytes:
    """The file's bytes with those of the patch in their place."""
    return data if patch is None else data[: patch[0]] + patch[1] + data[patch[0] + len(patch[1]) :]


def is_adts(head: bytes) -> bool:
    """Whether these bytes begin a raw AAC stream."""
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0


class Opened:
    """A file whose length is known, with as much of `soundfile.SoundFile` as it takes to read a clip; a child reads."""

    def __init__(self, file: Bytes, samplerate: int, channels: int, frames: int):
        self._file = file
        self.samplerate, self.channels, self.frames = samplerate, channels, frames
        self._place = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def seek(self, frame: int) -> None:
        self._place = frame
