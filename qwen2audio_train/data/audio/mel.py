"""Log-mel spectrograms, bit for bit those of WhisperFeatureExtractor, at the clip's own length instead of 30 s."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT
from qwen2audio_train.layout import (
    HOP_LENGTH,
    MAX_FRAMES,
    MAX_SAMPLES,
    MIN_FRAMES,
    NUM_MEL_BINS,
    SAMPLING_RATE,
    WINDOW_LENGTH,
    num_frames,
)

BAND_ROWS = 16
"""Mel filters that are applied at once; as fast as any number from 8 to 32."""


def log_mel(waveform: np.ndarray, num_mel_bins: int = NUM_MEL_BINS, family: Family = DEFAULT) -> tuple[np.ndarray, int]:
    """Whisper's log-mel spectrogram of one encoder window, in the slot layout of the family.

    The stock extractor pads every clip to 30 s. Its frames do not depend on each other, save for the clamp at 8 below
    the maximum, which padding cannot raise: so it is enough to pad as far as the frames that the encoder sees.

    Args:
        waveform: (n,) float32 at 16 kHz, at most 30 s.

    Returns:
        The spectrogram (num_mel_bins, family.mel_columns(L)) float32 and L, the clip's number of frames.
    """
    frames = num_frames(len(waveform))
    if frames < MIN_FRAMES or len(waveform) > MAX_SAMPLES:
        seconds = len(waveform) / SAMPLING_RATE
        raise ValueError(f"a window of {seconds:g} s: the encoder takes more than 0.02 s and at most 30 s")
    visible = min(frames + family.lookahead_frames, family.mel_columns(frames), MAX_FRAMES)
    # At least 32 frames: narrower matrix products take another path in BLAS and differ in the last bit.
    width = max(visible, 32)
    spectrum = torch.fft.rfft(_windowed(waveform, width)).numpy()
    # On contiguous parts, which NumPy separates faster, this is the stock `abs()`, bit for bit, at half of its cost.
    real, imaginary = (torch.from_numpy(np.ascontiguousarray(part)) for part in (spectrum.real, spectrum.imag))
    power = torch.hypot(real, imaginary).square_()
    log = _filtered(power.T, _bands(num_mel_bins))[:, :visible].clamp_(min=1e-10).log10_()
    mel = torch.zeros(num_mel_bins, family.mel_columns(frames))
    torch.clamp(log, min=log.max() - 8.0, out=mel[:, :visible]).add_(4.0).mul_(0.25)
    return mel.numpy(), frames


def _windowed(waveform: np.ndarray, width: int) -> torch.Tensor:
    """The first `width` frames (width, WINDOW_LENGTH) as `torch.stft` takes them, both borders reflected."""
    border = WINDOW_LENGTH // 2
    padded = np.zeros(min(HOP_LENGTH * width + border, MAX_SAMPLES) + 2 * border, dtype=np.float32)
    padded[border : border + len(waveform)] = waveform
    padded[:border] = padded[2 * border : border : -1]
    padded[-border:] = padded[-border - 2 : -2 * border - 2 : -1]
    return torch.from_numpy(padded).as_strided((width, WINDOW_LENGTH), (HOP_LENGTH, 1)) * _window()


Band = tuple[slice, slice, torch.Tensor]
"""Rows of the filters, the frequencies where any of them is not zero, and their values there."""


def _filtered(power: torch.Tensor, bands: tuple[Band, ...]) -> torch.Tensor:
    """filters @ power (1 + WINDOW_LENGTH // 2, n), by bands: a filter spans few frequencies."""
    out = torch.empty(bands[-1][0].stop, power.shape[1])
    for rows, frequencies, values in bands:
        torch.mm(values, power[frequencies], out=out[rows])
    return out


@cache
def _bands(num_mel_bins: int) -> tuple[Band, ...]:
    """The filters in bands of `BAND_ROWS` whose products are the whole one's to the bit.

    Zeros do not change a sum, but BLAS may cut a long sum in two and a short one not: so every band is tried out here,
    and where its product differs it keeps all frequencies. If even then it differs, there is one band of all rows.
    """
    filters = _filters(num_mel_bins)
    everything = slice(0, filters.shape[1])
    power = torch.rand(512, filters.shape[1], generator=torch.Generator().manual_seed(0)).T
    expected = filters @ power
    bands: list[Band] = []
    for start in range(0, num_mel_bins, BAND_ROWS):
        rows = slice(start, min(start + BAND_ROWS, num_mel_bins))
        used = filters[rows].any(dim=0).nonzero()
        near = slice(int(used.min()), int(used.max()) + 1)
        same = torch.equal(filters[rows, near] @ power[near], expected[rows])
        frequencies = near if same else everything
        bands.append((rows, frequencies, filters[rows, frequencies].contiguous()))
    if torch.equal(_filtered(power, tuple(bands)), expected):
        return tuple(bands)
    return ((slice(0, num_mel_bins), everything, filters),)


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
