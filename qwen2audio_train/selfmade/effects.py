"""Rooms and noise: what lies between a clean synthesis and a recording."""

from __future__ import annotations

import numpy as np

from qwen2audio_train.layout import SAMPLING_RATE


def rms(waveform: np.ndarray) -> float:
    """Root mean square of a waveform."""
    return float(np.sqrt(np.mean(np.square(waveform, dtype=np.float64))))


def set_level(waveform: np.ndarray, level_db: float) -> np.ndarray:
    """Scale to an RMS of `level_db` dB below full scale (1.0), less where that would clip."""
    gain = 10 ** (level_db / 20) / max(rms(waveform), 1e-8)
    peak = float(np.abs(waveform).max()) * gain
    return (waveform * (gain * min(1.0, 0.98 / max(peak, 1e-8)))).astype(np.float32)


def convolve(waveform: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Full linear convolution by FFT -> (len(waveform) + len(kernel) - 1,)."""
    length = len(waveform) + len(kernel) - 1
    size = 1 << (length - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(kernel, size), size)[:length]


def band(waveform: np.ndarray, low: float, high: float) -> np.ndarray:
    """Band-pass between `low` and `high` Hz, with Butterworth-like slopes of the second order and no delay."""
    size = 1 << (len(waveform) - 1).bit_length()
    frequency = np.maximum(np.fft.rfftfreq(size, 1 / SAMPLING_RATE), 1e-3)
    response = 1 / np.sqrt((1 + (low / frequency) ** 4) * (1 + (frequency / high) ** 4))
    return np.fft.irfft(np.fft.rfft(waveform, size) * response, size)[: len(waveform)]


def coloured_noise(num_samples: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit RMS whose power falls as 1 / f^exponent (0 white, 1 pink, 2 brown) above 40 Hz."""
    spectrum = rng.standard_normal(num_samples // 2 + 1) + 1j * rng.standard_normal(num_samples // 2 + 1)
    frequency = np.fft.rfftfreq(num_samples, 1 / SAMPLING_RATE)
    spectrum *= np.maximum(frequency, 40.0) ** (-exponent / 2) * (frequency > 20.0)
    noise = np.fft.irfft(spectrum, num_samples)
    return (noise / max(rms(noise), 1e-12)).astype(np.float32)


def add_noise(waveform: np.ndarray, snr_db: float, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Add coloured noise at a signal-to-noise ratio (power of the whole clip over power of the noise)."""
    noise = coloured_noise(len(waveform), exponent, rng)
    return waveform + noise * np.float32(rms(waveform) * 10 ** (-snr_db / 20))


def reverberate(waveform: np.ndarray, rt60_s: float, wet_db: float, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a synthetic room: the direct path and a noise tail that decays by 60 dB in `rt60_s`.

    The tail starts after 5 ms and holds `wet_db` dB of the direct path's energy; the clip grows by at most 0.1 s.
    """
    time = np.arange(int(rt60_s * SAMPLING_RATE)) / SAMPLING_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3.0 * time / rt60_s)
    room = np.zeros(len(time) + SAMPLING_RATE // 200)
    room[-len(time) :] = tail * 10 ** (wet_db / 20) / np.sqrt(np.sum(tail**2))
    room[0] = 1.0
    return convolve(waveform, room)[: len(waveform) + SAMPLING_RATE // 10].astype(np.float32)


def mix(base: np.ndarray, other: np.ndarray, at: int, gain_db: float) -> np.ndarray:
    """Lay `other` over `base` from sample `at` on, `gain_db` above (or below) the RMS of the base; cut at its end."""
    part = other[: max(0, len(base) - at)]
    result = base.astype(np.float32).copy()
    result[at : at + len(part)] += part * np.float32(rms(base) * 10 ** (gain_db / 20) / max(rms(other), 1e-8))
    return result
