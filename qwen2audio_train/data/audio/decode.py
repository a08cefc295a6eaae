"""Reading audio: bounds first, then decode, mix to mono, resample to 16 kHz.

A compressed file of two megabytes can hold ten hours of silence, so what a header announces is checked against
`AudioLimits` before a single sample is decoded. Paths are local files, members of tar files (`shard.tar::a.flac`, read
in place by offset), or URLs that fsspec understands. Whole FLAC files, the usual form of speech corpora, go through
dr_flac, which takes half of libsndfile's time.

A length is worked out in one place (`files.open_audio`): so `probe`, `clip_duration` and `load_audio` always agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import miniaudio
import numpy as np
import soundfile
import soxr

from qwen2audio_train.data.audio.deadline import DeadlineError, within
from qwen2audio_train.data.audio.ffmpeg import MediaFile
from qwen2audio_train.data.audio.files import (
    LIMITS,
    AudioError,
    AudioFile,
    AudioLimits,
    Header,
    Source,
    check_header,
    open_audio,
)
from qwen2audio_train.data.audio.flac import with_flac_length
from qwen2audio_train.data.audio.raw import FormatError
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.storage.blobs import BlobError, Place, container
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.layout import MIN_DURATION_S, SAMPLING_RATE, num_samples_of

END_TOLERANCE_S = 0.05
"""A slice may end this much beyond its file: durations in manifests are rounded."""
BLOCK_SAMPLES = 2**24
"""Samples of all channels that are decoded at a time, before they become one channel."""

REMOTE = Remote()
Result = TypeVar("Result")


@dataclass(frozen=True)
class AudioInfo:
    """What a file holds, without decoding it."""

    duration_s: float
    sampling_rate: int
    channels: int
    num_samples: int


def probe(path: str, data: bytes | None = None, limits: AudioLimits = LIMITS, remote: Remote = REMOTE) -> AudioInfo:
    """Length, rate and channels of a file (or of its `data`). Raises AudioError."""
    return _read(_info, Clip(path, None), data, limits, remote)


def clip_duration(
    clip: Clip, data: bytes | None = None, limits: AudioLimits = LIMITS, remote: Remote = REMOTE
) -> float:
    """Seconds that `load_audio` will give, from the file's header alone: those of the slice.

    Raises:
        AudioError: whatever `load_audio` raises before it decodes: not readable, out of bounds, too short, cut off.
    """
    return _read(_duration, clip, data, limits, remote)


def load_audio(
    clip: Clip,
    data: bytes | None = None,
    limits: AudioLimits = LIMITS,
    remote: Remote = REMOTE,
) -> np.ndarray:
    """Samples of a clip: (n,) float32, 16 kHz, the clip's channel or the mean of all.

    Args:
        data: the file's bytes, where a reader already holds them; `clip.path` then only names them in errors.
        remote: how files that are not here are read.

    Raises:
        AudioError: not readable, out of bounds, shorter than an audio token, cut off, not finite, or not decoded
            within `limits.timeout_s`.
    """
    return _read(_waveform, clip, data, limits, remote)


def load_as_stored(
    clip: Clip, data: bytes | None = None, limits: AudioLimits = LIMITS, remote: Remote = REMOTE
) -> tuple[np.ndarray, int, bool]:
    """Samples (n, channels) float64 of a clip at its file's rate, the rate, and whether they have over 16 bits.

    Raises AudioError as `load_audio` does.
    """
    return _read(_stored, clip, data, limits, remote)


def _read(
    work: Callable[[Clip, Source, AudioLimits], Result],
    clip: Clip,
    data: bytes | None,
    limits: AudioLimits,
    remote: Remote,
) -> Result:
    """`work(clip, source, limits)` within the deadline; the one place where what reading may raise becomes a reason."""

    def use(source: Source) -> Result:
        return within(limits.timeout_s, work, clip, source, limits)

    try:
        if data is not None:
            return use(data)
        again = clip.duration_s is None  # its length was asked for before, or will be
        return remote.reading(clip.path, limits.max_bytes, use, in_parts=_is_slice(clip), again=again)
    except AudioError:
        raise
    except DeadlineError as error:
        raise AudioError(clip.path, f"its decoder {error}; leave it out, or write the file again") from error
    except (FormatError, BlobError) as error:
        raise AudioError(clip.path, str(error).removeprefix(f"{container(clip.path)}: ")) from error
    except FileNotFoundError as error:
        raise AudioError(clip.path, "no such file") from error
    except OSError as error:
        raise AudioError(clip.path, f"cannot be read ({error.strerror or error})") from error


def _is_slice(clip: Clip) -> bool:
    return clip.start_s > 0 or clip.end_s is not None


def _info(clip: Clip, source: Source, limits: AudioLimits) -> AudioInfo:
    with open_audio(clip.path, source, limits) as file:
        return AudioInfo(file.frames / file.samplerate, file.samplerate, file.channels, file.frames)


def _duration(clip: Clip, source: Source, limits: AudioLimits) -> float:
    with open_audio(clip.path, source, limits) as file:
        start, stop = _bounds(clip, file, limits)
        seconds = (stop - start) / file.samplerate
    _check_long_enough(clip, num_samples_of(seconds))
    return seconds


def _waveform(clip: Clip, source: Source, limits: AudioLimits) -> np.ndarray:
    if not _is_slice(clip) and isinstance(source, Place) and not source.is_whole_file:
        source = source.read(limits.max_bytes)
    whole = _whole_flac(clip, source, limits)
    if whole is not None:
        samples, rate = _mono(whole[0], clip), whole[1]
    else:
        with open_audio(clip.path, source, limits) as file:
            rate = file.samplerate
            start, stop = _bounds(clip, file, limits)
            most = BLOCK_SAMPLES // file.channels
            blocks = [
                _mono(_decoded(file, clip, place, min(stop, place + most)), clip) for place in range(start, stop, most)
            ]
        samples = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    if not np.isfinite(samples).all():
        raise AudioError(clip.path, "holds samples that are not finite (NaN or infinity)")
    waveform = _resampled(samples, rate)
    _check_long_enough(clip, len(waveform))
    return waveform


def _stored(clip: Clip, source: Source, limits: AudioLimits) -> tuple[np.ndarray, int, bool]:
    with open_audio(clip.path, source, limits) as file:
        start, stop = _bounds(clip, file, limits)
        deep = getattr(file, "subtype", "FLOAT") in ("PCM_24", "PCM_32", "FLOAT", "DOUBLE")
        return _decoded(file, clip, start, stop, "float64"), file.samplerate, deep


def _whole_flac(clip: Clip, source: Source, limits: AudioLimits) -> tuple[np.ndarray, int] | None:
    """All samples (n, channels) of a FLAC file and their rate; None where libsndfile is to read it or to refuse it."""
    if _is_slice(clip):
        return None
    try:
        if isinstance(source, bytes):
            data = source
        elif source.path.lower().endswith(".flac") and os.path.getsize(source.path) <= limits.max_bytes:
            data = Path(source.path).read_bytes()
        else:
            return None
        if not data.startswith(b"fLaC"):
            return None
        data = with_flac_length(data)
        found = miniaudio.flac_get_info(data)
        header = Header(found.num_frames, found.sample_rate, found.nchannels)
        check_header(header, clip.path, limits)
        _bounds(clip, header, limits)
        samples = np.frombuffer(miniaudio.flac_read_f32(data).samples, np.float32).reshape(-1, header.channels)
    except (OSError, ZeroDivisionError, miniaudio.MiniaudioError):  # it divides by the header's rate
        return None
    return (samples, header.samplerate) if len(samples) == header.frames else None


def _decoded(file: AudioFile, clip: Clip, start: int, stop: int, dtype: str = "float32") -> np.ndarray:
    """Samples (n, channels) start .. stop - 1 of an open file. Raises AudioError where they are not there."""
    try:
        if start:  # in FLAC even a seek to where it stands decodes a block
            file.seek(start)
        samples = file.read(stop - start, dtype=dtype, always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(clip.path, f"cannot be decoded ({error}): fetch or write the file again") from error
    # an encoder's last block is not always whole, and headers of media count it so
    missing_s = (stop - start - len(samples)) / file.samplerate
    if missing_s > (END_TOLERANCE_S if isinstance(file, MediaFile) else 0):
        got, promised = (start + len(samples)) / file.samplerate, stop / file.samplerate
        raise AudioError(
            clip.path,
            f"ends after {got:.3f} s where its header promises {promised:.3f} s: is it cut off or damaged? "
            "`ffmpeg -i IN OUT.flac` keeps what can be read",
        )
    return samples


def _mono(samples: np.ndarray, clip: Clip) -> np.ndarray:
    if clip.channel is None:
        return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    if clip.channel >= samples.shape[1]:
        found = f"has {samples.shape[1]} channels, so there is no channel {clip.channel} (counted from 0)"
        raise AudioError(clip.path, found)
    return samples[:, clip.channel]


def _resampled(waveform: np.ndarray, rate: int) -> np.ndarray:
    if rate == SAMPLING_RATE:
        return np.ascontiguousarray(waveform)
    return soxr.resample(waveform, rate, SAMPLING_RATE, quality="HQ")


def _check_long_enough(clip: Clip, num_samples: int) -> None:
    if num_samples < num_samples_of(MIN_DURATION_S):
        found = f"{num_samples / SAMPLING_RATE:.3f} s is too short for an audio token ({MIN_DURATION_S} s)"
        raise AudioError(clip.path, found)


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
