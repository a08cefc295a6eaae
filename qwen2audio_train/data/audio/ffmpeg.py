"""M4A, AAC, WebM and MP4, which libsndfile does not read: through torchcodec and FFmpeg, the extra `media`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2audio_train.data.audio.foreign import TO_FLAC
from qwen2audio_train.data.audio.matroska import Clusters, find_clusters
from qwen2audio_train.data.audio.raw import Bytes, FormatError, Opened, is_adts

MISSING = "is M4A, AAC, WebM or MP4, which needs torchcodec and FFmpeg (pip install 'qwen2audio-train[media]')"
ADTS_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
ADTS_SAMPLES = 1024
MOST_S = 1801.0
"""Decoded at most to learn the length of a file that does not tell it: as much as a clip may last."""
LEAD_S = 0.1
"""Opus wants 80 ms before a slice to begin in."""


def is_matroska(head: bytes) -> bool:
    return head[:4] == b"\x1a\x45\xdf\xa3"


def is_media(head: bytes) -> bool:
    """Whether a file that starts with these 12 bytes is MP4 or M4A, WebM or Matroska, or raw AAC (ADTS)."""
    return head[4:8] == b"ftyp" or is_matroska(head) or is_adts(head)


@dataclass(frozen=True)
class Media:
    """What a file's container tells: samples, and the seconds at which the first one stands."""

    samplerate: int
    channels: int
    frames: int
    origin_s: float = 0.0
    clusters: Clusters | None = None


def look_through(file: Bytes, size: int) -> Media:
    """Learn a file's length without decoding all of it.

    Raises:
        FormatError: torchcodec or FFmpeg is missing; no audio in it; cut off.
    """
    file.seek(0)
    head = file.read(12)
    if is_matroska(head):
        return _clustered(file, find_clusters(file, size))
    decoder, about = _opened(file)
    rate = int(about.sample_rate)
    length = about.duration_seconds_from_header
    if is_adts(head):  # FFmpeg guesses it from the bit rate
        file.seek(0)
        length = _adts_seconds(file.read(size))
    elif not length:
        length = _decoded(decoder, 0.0, MOST_S).data.shape[1] / rate
        if length > MOST_S - 1:
            raise FormatError("does not say how long it is: `ffmpeg -i IN -c copy OUT` writes that in")
    first = _decoded(decoder, 0.0, LEAD_S)  # of a fragmented MP4 it comes after the encoder's delay
    return Media(rate, int(about.num_channels), round(length * rate), float(first.pts_seconds))


def _clustered(file: Bytes, clusters: Clusters) -> Media:
    first = _part(file, clusters, clusters.times_s[0], clusters.times_s[0])
    last = _part(file, clusters, clusters.times_s[-1], clusters.times_s[-1])
    decoder, about = _opened(first)
    start, end = _decoded(decoder), _decoded(_opened(last)[0])
    rate = int(about.sample_rate)
    until = end.pts_seconds + end.data.shape[1] / rate
    return Media(rate, int(about.num_channels), round((until - start.pts_seconds) * rate), start.pts_seconds, clusters)


def _part(file: Bytes, clusters: Clusters, start_s: float, stop_s: float) -> bytes:
    first, last = clusters.between(start_s, stop_s)
    file.seek(first)
    return clusters.head + file.read(last - first)


def _opened(file: Bytes | bytes) -> tuple[Any, Any]:
    """A decoder and what it says of the first audio stream."""
    try:
        from torchcodec.decoders import AudioDecoder  # an extra; it loads FFmpeg's libraries
    except (ImportError, OSError, RuntimeError) as error:
        raise FormatError(f"{MISSING}, or convert it: {TO_FLAC} ({_first_line(error.__cause__ or error)})") from error
    try:
        if not isinstance(file, bytes):
            file.seek(0)
        decoder = AudioDecoder(file)
        return decoder, decoder.metadata
    except (RuntimeError, ValueError, TypeError) as error:
        raise FormatError(f"holds no audio that FFmpeg reads ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _decoded(decoder: Any, start_s: float | None = None, stop_s: float | None = None) -> Any:
    try:
        return decoder.get_samples_played_in_range(start_s or 0.0, stop_s)
    except (RuntimeError, ValueError) as error:
        raise FormatError(f"cannot be decoded ({_first_line(error)})") from error


def _adts_seconds(data: bytes) -> float:
    """Length of a raw AAC stream: its frames counted. Raises FormatError where the last one is not whole."""
    place = number = 0
    while place + 7 <= len(data) and is_adts(data[place : place + 2]):
        size = (data[place + 3] & 3) << 11 | data[place + 4] << 3 | data[place + 5] >> 5
        if size < 7:
            break
        number, place = number + 1 + (data[place + 6] & 3), place + size
    if place > len(data):
        raise FormatError("is cut off: its last AAC frame is not whole; fetch the file again")
    rate = data[2] >> 2 & 15
    if rate >= len(ADTS_RATES):
        raise FormatError("has an AAC header that makes no sense: is it damaged?")
    return number * ADTS_SAMPLES / ADTS_RATES[rate]


class MediaFile(Opened):
    """The first audio stream of a file."""

    def __init__(self, file: Bytes, media: Media):
        super().__init__(file, media.samplerate, media.channels, media.frames)
        self._media = media

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray:
        """(frames, channels) float32 from the place that was sought, fewer where the file ends."""
        media, rate = self._media, self.samplerate
        start_s = media.origin_s + self._place / rate
        stop_s = start_s + frames / rate
        clusters = media.clusters
        part = self._file if clusters is None else _part(self._file, clusters, start_s - LEAD_S, stop_s)
        found = _decoded(_opened(part)[0], start_s, stop_s)
        late = round((start_s - found.pts_seconds) * rate)
        self._place += frames
        return np.asarray(found.data.T.numpy(), dtype)[max(0, late) :][:frames]
