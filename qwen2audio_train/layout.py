"""The front end before the encoder, as both `data` and `model` have to know it: rates, windows, limits.

They are Whisper's: 16 kHz, 25 ms window, 10 ms hop, windows of 30 s. What an encoder makes of them is its family's
matter: see `families`.
"""

from __future__ import annotations

SAMPLING_RATE = 16_000
"""Samples per second that the encoder was trained on."""

WINDOW_LENGTH = 400
"""Samples of one STFT window (25 ms)."""

HOP_LENGTH = 160
"""Samples between two mel frames (10 ms)."""

NUM_MEL_BINS = 128
"""Mel bands of Whisper-large-v3."""

MAX_FRAMES = 3_000
"""Mel frames of the longest encoder window (30 s)."""

MAX_SAMPLES = MAX_FRAMES * HOP_LENGTH
"""Samples of the longest encoder window (30 s)."""

MIN_FRAMES = 3
"""Mel frames of the shortest clip that is taken: more than 0.02 s."""

MIN_DURATION_S = 0.04
"""Shortest clip that is accepted, in seconds."""


def num_frames(num_samples: int) -> int:
    """Mel frames of a waveform of `num_samples` at 16 kHz: one per started hop."""
    return -(-num_samples // HOP_LENGTH)


def window_samples(num_samples: int) -> list[int]:
    """Lengths in samples of the encoder windows of a clip: one up to 30 s, else full windows and a rest.

    A rest too short for a token of its own is taken off the window before it, so that no sample is lost.
    """
    full, rest = divmod(num_samples, MAX_SAMPLES)
    if full == 0:
        return [num_samples]
    if rest == 0:
        return [MAX_SAMPLES] * full
    if num_frames(rest) < MIN_FRAMES:
        short = MIN_FRAMES * HOP_LENGTH
        return [MAX_SAMPLES] * (full - 1) + [MAX_SAMPLES + rest - short, short]
    return [MAX_SAMPLES] * full + [rest]


def num_samples_of(duration_s: float) -> int:
    """Samples at 16 kHz of a clip of `duration_s` seconds, as every length in the project is rounded."""
    return round(duration_s * SAMPLING_RATE)
