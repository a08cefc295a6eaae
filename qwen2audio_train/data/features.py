"""Log-mel spectrograms, bit for bit those of WhisperFeatureExtractor, at the clip's own length instead of 30 s."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from qwen2audio_train.layout import (
    HOP_LENGTH,
    MAX_FRAMES,
    MAX_SAMPLES,
    MIN_FRAMES,
    NUM_MEL_BINS,
    SAMPLING_RATE,
    WINDOW_LENGTH,
    mel_columns,
    num_frames,
)


def log_mel(waveform: np.ndarray, num_mel_bins: int = NUM_MEL_BINS) -> tuple[np.ndarray, int]:
    """Whisper's log-mel spectrogram of one encoder window, in the slot layout of `layout.mel_columns`.

    The stock extractor pads every clip to 30 s. Its frames do not depend on each other, save for the clamp at 8 below
    the maximum, which padding cannot raise: so it is enough to pad as far as the frames that the encoder sees.

    Args:
        waveform: (n,) float32 at 16 kHz, at most 30 s.

    Returns:
        The spectrogram (num_mel_bins, mel_columns(L)) float32 and L, the clip's number of frames.
    """
    frames = num_frames(len(waveform))
    if frames < MIN_FRAMES or len(waveform) > MAX_SAMPLES:
        seconds = len(waveform) / SAMPLING_RATE
        raise ValueError(f"a window of {seconds:g} s: the encoder takes more than 0.02 s and at most 30 s")
    visible = min(frames + 2, MAX_FRAMES)
    # At least 32 frames: narrower matrix products take another path in BLAS and differ in the last bit.
    padded = torch.zeros(min(HOP_LENGTH * max(visible, 32) + WINDOW_LENGTH // 2, MAX_SAMPLES))
    padded[: len(waveform)] = torch.from_numpy(waveform)
    spectrum = torch.stft(padded, WINDOW_LENGTH, HOP_LENGTH, window=_window(), return_complex=True)
    power = (spectrum[:, : max(visible, 32)].abs() ** 2).contiguous()
    log = torch.clamp(_filters(num_mel_bins) @ power, min=1e-10).log10()[:, :visible]
    mel = torch.zeros(num_mel_bins, mel_columns(frames))
    mel[:, :visible] = (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0
    return mel.numpy(), frames


@cache
def _window() -> torch.Tensor:
    return torch.hann_window(WINDOW_LENGTH)


@cache
def _filters(num_mel_bins: int) -> torch.Tensor:
    filters = mel_filter_bank(
        num_frequency_bins=1 + WINDOW_LENGTH // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=SAMPLING_RATE / 2,
        sampling_rate=SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).to(torch.float32).T
