"""An open audio file of its true length: libsndfile reads WAV, FLAC, OGG and MP3, `ffmpeg` the rest.

What a header says is held against the file first (`containers`, `mp3`), and mended where a writer left it open.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import soundfile

from qwen2audio_train.data.audio.containers import Layout, examine, flac_of_ogg
from qwen2audio_train.data.audio.ffmpeg import Media, MediaFile, is_media, look_through
from qwen2audio_train.data.audio.foreign import TO_FLAC
from qwen2audio_train.data.audio.mp3 import MOST_JUNK, Frames, Mp3File, begins_midway, find_frames
from qwen2audio_train.data.audio.raw import FormatError, Patch, mended
from qwen2audio_train.data.storage.blobs import Place, Span
from qwen2audio_train.data.storage.paths import shown
from qwen2audio_train.errors import ExampleError

AudioFile: TypeAlias = soundfile.SoundFile | MediaFile | Mp3File
Source: TypeAlias = bytes | Place


@dataclass(frozen=True)
class Header:
    """Of a FLAC file what an open `AudioFile` says of itself."""

    frames: int
    samplerate: int
    channels: int


class AudioError(ExampleError):
    """A clip that cannot be read; the message names its path and the reason."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


@dataclass(frozen=True)
class AudioLimits:
    """What is decoded at most: the length applies to the clip (the slice), not to the file that it is cut from."""

    max_duration_s: float = 1800.0
    max_samples: int = 2**28
    """Of all channels, at the file's rate: 1 GiB as they are decoded."""
    max_channels: int = 16
    min_sampling_rate: int = 2_000
    max_sampling_rate: int = 384_000
    max_bytes: int = 2**30
    """Size of a tar member or a download, both of which are held in memory."""
    timeout_s: float | None = None
    """Seconds that a decoder may take for one clip, in a process of its own; None decodes in this one, endlessly."""


LIMITS = AudioLimits()
NOT_KNOWN = "format not recognised"


def open_audio(path: str, source: Source, limits: AudioLimits) -> AudioFile:
    """The open file, of its true length and within the limits. Raises AudioError, FormatError, BlobError, OSError."""
    layout, inside = _known(source)
    if layout.tags:
        return open_audio(path, _behind(source, layout.tags), limits)
    if layout.is_ogg_flac:
        with _raw(source) as file:
            return open_audio(path, flac_of_ogg(file.read(limits.max_bytes)), limits)
    if isinstance(inside, Frames):
        return _checked(Mp3File(_raw(source), inside), path, limits)
    if isinstance(inside, Media):
        return _checked(MediaFile(_raw(source), inside), path, limits)
    try:
        return _checked(_sound_file(source, layout.patch), path, limits)
    except (soundfile.LibsndfileError, TypeError) as error:
        told = getattr(error, "error_string", str(error))  # without the address of a file object
        why = NOT_KNOWN if "not a regular file" in told else told  # its words for a file of text, say
        raise AudioError(
            path,
            f"is no audio that libsndfile reads ({why}); WAV, FLAC, OGG and MP3 are: {TO_FLAC}, if FFmpeg reads it",
        ) from error


def _raw(source: Source, patch: Patch | None = None) -> io.BytesIO | Span:
    return Span(source, patch) if isinstance(source, Place) else io.BytesIO(mended(source, patch))


def _behind(source: Source, tags: int) -> Source:
    """A file without the bytes of tags in front."""
    if isinstance(source, bytes):
        return source[tags:]
    return Place(source.path, source.offset + tags, None if source.size is None else source.size - tags)


def _sound_file(source: Source, patch: Patch | None = None) -> soundfile.SoundFile:
    if isinstance(source, Place) and source.is_whole_file and patch is None:
        return soundfile.SoundFile(os.fsencode(source.path))  # faster than through a file of ours
    return soundfile.SoundFile(_raw(source, patch))


Inside: TypeAlias = Frames | Media | None
"""What was learnt of a file that is not libsndfile's."""


def _known(source: Source) -> tuple[Layout, Inside]:
    """What the container says; of files, kept for the slices that follow."""
    if isinstance(source, bytes):
        return _looked_through(source)
    status = os.stat(source.path)
    return _remembered(source, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)  # an hour of MP3 takes a megabyte
def _remembered(place: Place, size: int, modified_ns: int) -> tuple[Layout, Inside]:
    # size and time only tell versions of the file apart
    return _looked_through(place)


def _looked_through(source: Source) -> tuple[Layout, Inside]:
    with _raw(source) as file:
        size = file.seek(0, os.SEEK_END)
        layout = examine(file, size)
        if layout.tags or layout.is_ogg_flac:
            return layout, None
        file.seek(0)
        if is_media(file.read(12)):
            return layout, look_through(file, size)
        stretch = layout.mp3 if layout.is_settled else _look_again(source, file)
        if stretch is None:
            return layout, None
        file.seek(stretch[0])
        return layout, find_frames(file.read(stretch[1] - stretch[0]), stretch[0])


def _look_again(source: Source, file: io.BytesIO | Span) -> tuple[int, int] | None:
    """What takes a decoder: whether a FLAC file ends where it says, and the stretch of MP3 that begins midway."""
    try:
        with _sound_file(source) as sound:
            if sound.format == "FLAC" and 0 < sound.frames < 2**62:
                _check_end(sound)
            return (0, file.seek(0, os.SEEK_END)) if sound.format == "MP3" else None
    except (soundfile.LibsndfileError, TypeError):
        file.seek(0)
        return (0, file.seek(0, os.SEEK_END)) if begins_midway(file.read(2 * MOST_JUNK)) else None


def _check_end(flac: soundfile.SoundFile) -> None:
    try:
        flac.seek(flac.frames - 1)
        is_there = len(flac.read(1)) == 1
    except (soundfile.LibsndfileError, RuntimeError):
        is_there = False
    if not is_there:
        lasts = flac.frames / flac.samplerate
        raise FormatError(f"is cut off or damaged: its header promises {lasts:.3f} s, and the end cannot be read")


def _checked(file: AudioFile, path: str, limits: AudioLimits) -> AudioFile:
    try:
        check_header(file, path, limits)
    except AudioError:
        file.close()
        raise
    return file


def check_header(file: AudioFile | Header, path: str, limits: AudioLimits) -> None:
    if file.frames <= 0:
        raise AudioError(path, "holds no samples")
    if file.frames >= 2**62:
        raise AudioError(path, "does not say how long it is: is it cut off?")
    if file.channels > limits.max_channels:
        raise AudioError(path, f"{file.channels} channels are beyond the limit of {limits.max_channels}")
    if not limits.min_sampling_rate <= file.samplerate <= limits.max_sampling_rate:
        bounds = f"{limits.min_sampling_rate}..{limits.max_sampling_rate}"
        raise AudioError(path, f"a sampling rate of {file.samplerate} Hz is outside of {bounds} Hz")
