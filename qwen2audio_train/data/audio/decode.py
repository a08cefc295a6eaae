"""Reading audio: bounds first, then decode, mix to mono, resample to 16 kHz.

A compressed file of two megabytes can hold ten hours of silence, so what a header announces is checked against
`AudioLimits` before a single sample is decoded. Paths are local files, members of tar files (`shard.tar::a.flac`, read
in place by offset), or URLs that fsspec understands. libsndfile reads WAV, FLAC, OGG and MP3, `media` the rest. Whole
FLAC files, the usual form of speech corpora, go through dr_flac, which takes half of libsndfile's time.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import miniaudio
import numpy as np
import soundfile
import soxr

from qwen2audio_train.data.audio.ffmpeg import MediaError, MediaFile, is_media
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.storage.blobs import BlobError
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.layout import MIN_FRAMES, SAMPLING_RATE, num_frames

END_TOLERANCE_S = 0.05
"""A slice may end this much beyond its file: durations in manifests are rounded."""

AudioFile: TypeAlias = soundfile.SoundFile | MediaFile


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
        return f"{self.path}: {self.reason}"


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


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says."""

    duration_s: float
    sampling_rate: int
    channels: int
    num_samples: int


def probe(path: str, data: bytes | None = None, limits: AudioLimits = AudioLimits()) -> AudioInfo:
    """Length, rate and channels of a file (or of its `data`) from the header. Raises AudioError."""
    with open_audio(path, data, limits) as file:
        return AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels, file.frames)


def load_audio(
    clip: Clip,
    data: bytes | None = None,
    limits: AudioLimits = AudioLimits(),
) -> np.ndarray:
    """Samples of a clip: (n,) float32, 16 kHz, the clip's channel or the mean of all.

    Args:
        data: the file's bytes, where a reader already holds them; `clip.path` then only names them in errors.

    Raises:
        AudioError: not readable, out of bounds, shorter than an audio token, cut off, or not finite.
    """
    samples, rate = _whole_flac(clip, data, limits) or _slice(clip, data, limits)
    if not np.isfinite(samples).all():
        raise AudioError(clip.path, "holds samples that are not finite (NaN or infinity)")
    waveform = _resampled(_mono(samples, clip.channel, clip.path), rate)
    if num_frames(len(waveform)) < MIN_FRAMES:
        raise AudioError(clip.path, f"{len(waveform) / SAMPLING_RATE:.3f} s is too short for an audio token (0.04 s)")
    return waveform


def _whole_flac(clip: Clip, data: bytes | None, limits: AudioLimits) -> tuple[np.ndarray, int] | None:
    """All samples (n, channels) of a FLAC file and their rate; None where libsndfile is to read it or to refuse it."""
    if clip.start_s or clip.end_s is not None:
        return None
    try:
        if data is None and clip.path.lower().endswith(".flac") and os.path.getsize(clip.path) <= limits.max_bytes:
            data = Path(clip.path).read_bytes()
        if data is None or not data.startswith(b"fLaC"):
            return None
        found = miniaudio.flac_get_info(data)
        if not found.num_frames:
            return None
        header = Header(found.num_frames, found.sample_rate, found.nchannels)
        _check_header(header, clip.path, limits)
        _bounds(clip, header, limits)
        samples = np.frombuffer(miniaudio.flac_read_f32(data).samples, np.float32).reshape(-1, header.channels)
    except (OSError, miniaudio.MiniaudioError):
        return None
    return (samples, header.samplerate) if len(samples) == header.frames else None


def _slice(clip: Clip, data: bytes | None, limits: AudioLimits) -> tuple[np.ndarray, int]:
    """Samples (n, channels) of a clip and their rate, by libsndfile or FFmpeg."""
    with open_audio(clip.path, data, limits) as file:
        rate = file.samplerate
        start, stop = _bounds(clip, file, limits)
        try:
            if start:  # in FLAC even a seek to where it stands decodes a block
                file.seek(start)
            samples = file.read(stop - start, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise AudioError(clip.path, f"cannot be decoded ({error})") from error
    # an encoder's last block is not always whole, and headers of media count it so
    missing_s = (stop - start - len(samples)) / rate
    if missing_s > (END_TOLERANCE_S if isinstance(file, MediaFile) else 0):
        got, promised = (start + len(samples)) / rate, stop / rate
        raise AudioError(
            clip.path, f"ends after {got:.3f} s where its header promises {promised:.3f} s: is it cut off?"
        )
    return samples, rate


def _mono(samples: np.ndarray, channel: int | None, path: str) -> np.ndarray:
    if channel is None:
        return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    if channel >= samples.shape[1]:
        raise AudioError(path, f"has {samples.shape[1]} channels, so there is no channel {channel} (counted from 0)")
    return samples[:, channel]


def _resampled(waveform: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLING_RATE:
        return np.ascontiguousarray(waveform)
    return soxr.resample(waveform, rate, SAMPLING_RATE, quality="HQ")


def _bounds(clip: Clip, file: AudioFile | Header, limits: AudioLimits) -> tuple[int, int]:
    """First and last sample of the slice, at the file's own rate."""
    rate, frames = file.samplerate, file.frames
    start = round(clip.start_s * rate)
    stop = frames if clip.end_s is None else round(clip.end_s * rate)
    if start >= frames or stop > frames + END_TOLERANCE_S * rate:
        end = "its end" if clip.end_s is None else f"{clip.end_s:g} s"
        raise AudioError(clip.path, f"is {frames / rate:.3f} s long: no slice from {clip.start_s:g} s to {end}")
    stop = min(stop, frames)
    if stop - start > limits.max_duration_s * rate:
        raise AudioError(
            clip.path,
            f"{(stop - start) / rate:.1f} s is beyond the limit of {limits.max_duration_s:g} s; cut it into slices",
        )
    if (stop - start) * file.channels > limits.max_samples:
        found = f"{(stop - start) / rate:.1f} s of {file.channels} channels at {rate} Hz"
        raise AudioError(clip.path, f"{found} are beyond the limit of {limits.max_samples} samples; cut it into slices")
    return start, stop


def open_audio(path: str, data: bytes | None, limits: AudioLimits) -> AudioFile:
    """The open file, its header within the limits."""
    source: str | BinaryIO = io.BytesIO(data) if data is not None else _source(path, limits)
    try:
        file: AudioFile = soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, TypeError) as error:
        if isinstance(source, str) and not os.path.isfile(source):
            raise AudioError(path, "no such file") from error
        if is_media(_head(source)):
            return _opened_media(path, source, limits)
        raise AudioError(
            path, f"is no audio that libsndfile reads ({error}); WAV, FLAC, OGG and MP3 are: convert it to one of them"
        ) from error
    return _checked(file, path, limits)


def _opened_media(path: str, source: str | BinaryIO, limits: AudioLimits) -> AudioFile:
    try:
        return _checked(MediaFile(source, limits.max_duration_s), path, limits)
    except MediaError as error:
        raise AudioError(path, str(error)) from error


def _head(source: str | BinaryIO) -> bytes:
    """The first bytes, which tell what a file is."""
    if isinstance(source, str):
        with open(source, "rb") as file:
            return file.read(12)
    source.seek(0)
    head = source.read(12)
    source.seek(0)
    return head


def _checked(file: AudioFile, path: str, limits: AudioLimits) -> AudioFile:
    try:
        _check_header(file, path, limits)
    except AudioError:
        file.close()
        raise
    return file


def _check_header(file: AudioFile | Header, path: str, limits: AudioLimits) -> None:
    if file.frames <= 0:
        raise AudioError(path, "holds no samples")
    if file.frames >= 2**62:
        raise AudioError(path, "does not say how long it is: is it cut off?")
    if file.channels > limits.max_channels:
        raise AudioError(path, f"{file.channels} channels are beyond the limit of {limits.max_channels}")
    if not limits.min_sampling_rate <= file.samplerate <= limits.max_sampling_rate:
        bounds = f"{limits.min_sampling_rate}..{limits.max_sampling_rate}"
        raise AudioError(path, f"a sampling rate of {file.samplerate} Hz is outside of {bounds} Hz")


def _source(path: str, limits: AudioLimits) -> str | BinaryIO:
    try:
        data = Remote().read_clip(path, limits.max_bytes)
    except BlobError as error:
        raise AudioError(path, str(error)) from error
    return path if data is None else io.BytesIO(data)
