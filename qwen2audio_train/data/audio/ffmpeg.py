"""M4A, AAC, WebM and MP4, which libsndfile does not read: through torchcodec and FFmpeg, the extra `media`."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwen2audio_train.data.audio.raw import Bytes, FormatError

MISSING = "is M4A, AAC, WebM or MP4, which needs torchcodec and FFmpeg (pip install 'qwen2audio-train[media]')"


def is_media(head: bytes) -> bool:
    """Whether a file that starts with these 12 bytes is MP4 or M4A, WebM or Matroska, or raw AAC (ADTS)."""
    is_adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    return head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3" or is_adts


class MediaFile:
    """The first audio stream of a file, with as much of `soundfile.SoundFile` as it takes to read a clip.

    Args:
        source: path or contents.
        longest_s: decoded at most to learn the length of a file whose header does not tell it.

    Raises:
        FormatError: torchcodec or FFmpeg is missing; no audio in it.
    """

    def __init__(self, source: str | Bytes, longest_s: float):
        try:
            from torchcodec.decoders import AudioDecoder  # an extra; it loads FFmpeg's libraries
        except (ImportError, OSError, RuntimeError) as error:
            raise FormatError(f"{MISSING}: {str(error).strip().splitlines()[0]}") from error
        try:
            self._decoder: Any = AudioDecoder(source if isinstance(source, str) else source.read())
            header = self._decoder.metadata
            self.samplerate, self.channels = int(header.sample_rate), int(header.num_channels)
            length = header.duration_seconds_from_header
            self.frames = len(self._samples(0, longest_s + 1)) if length is None else round(length * self.samplerate)
        except (RuntimeError, ValueError, TypeError) as error:
            raise FormatError(f"holds no audio that FFmpeg reads ({str(error).strip().splitlines()[0]})") from error
        self._place = 0

    def __enter__(self) -> MediaFile:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        self._decoder = None

    def seek(self, frame: int) -> None:
        self._place = frame

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray:
        """(frames, channels) float32 from the place that was sought, fewer where the file ends."""
        return self._samples(self._place / self.samplerate, (self._place + frames) / self.samplerate)[:frames]

    def _samples(self, start_s: float, stop_s: float) -> np.ndarray:
        return np.asarray(self._decoder.get_samples_played_in_range(start_s, stop_s).data.T.numpy())
