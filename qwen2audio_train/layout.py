"""Lengths, limits and special tokens: what both `data` and `model` have to know.

The lengths follow Whisper's front end (16 kHz, 25 ms window, 10 ms hop) and Qwen2-Audio's encoder: two convolutions,
the second with stride 2, then an average pooling with stride 2, so that one audio token covers 40 ms.
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
"""Fewest mel frames that give an audio token; 0.04 s has four, anything up to 0.02 s gives none."""

MIN_DURATION_S = 0.04
"""Shortest clip that is accepted, in seconds."""

AUDIO_TOKEN = "<|AUDIO|>"
AUDIO_BOS_TOKEN = "<|audio_bos|>"
AUDIO_EOS_TOKEN = "<|audio_eos|>"
IM_START_TOKEN = "<|im_start|>"
IM_END_TOKEN = "<|im_end|>"
END_OF_TEXT_TOKEN = "<|endoftext|>"

SPECIAL_TOKENS = (
    END_OF_TEXT_TOKEN,
    IM_START_TOKEN,
    IM_END_TOKEN,
    AUDIO_TOKEN,
    AUDIO_BOS_TOKEN,
    AUDIO_EOS_TOKEN,
)
"""In the order of their published ids (151643 .. 151648)."""


def num_frames(num_samples: int) -> int:
    """Mel frames of a waveform of `num_samples` at 16 kHz: one per started hop."""
    return -(-num_samples // HOP_LENGTH)


def num_encoder_frames(frames: int) -> int:
    """Frames after the second convolution (20 ms each) of a clip of `frames` mel frames."""
    return (frames - 1) // 2 + 1


def num_audio_tokens(frames: int) -> int:
    """Audio tokens (40 ms each) of a clip of `frames` mel frames; a trailing odd encoder frame is dropped."""
    return (num_encoder_frames(frames) - 2) // 2 + 1


def mel_columns(frames: int) -> int:
    """Columns that a clip of `frames` mel frames takes in a packed mel spectrogram.

    The clip's frames are followed by the two frames that the convolutions see beyond its end (zeros from frame 3 000
    on, where the stock encoder's own zero padding begins) and by one zero column that stands for the padding before
    the next clip. The total is even, so that every clip starts on the stride of the second convolution.
    """
    return (frames + 4) // 2 * 2


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


def num_clip_tokens(num_samples: int) -> int:
    """Audio tokens of a whole clip, over all of its encoder windows."""
    return sum(num_audio_tokens(num_frames(n)) for n in window_samples(num_samples))
