"""Everyday sounds, scenes and notes by synthesis: each call draws its own variant from `rng`, peak about 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qwen2audio_train.layout import SAMPLING_RATE
from qwen2audio_train.selfmade.effects import band, coloured_noise, convolve, rms

Rng = np.random.Generator


def _time(duration_s: float) -> np.ndarray:
    return np.arange(int(duration_s * SAMPLING_RATE)) / SAMPLING_RATE


def _peak(waveform: np.ndarray) -> np.ndarray:
    return (waveform / max(float(np.abs(waveform).max()), 1e-8)).astype(np.float32)


def _sweep(frequency: np.ndarray) -> np.ndarray:
    """Phase of an oscillator with the given frequency in Hz at each sample."""
    return 2 * np.pi * np.cumsum(frequency) / SAMPLING_RATE


def _place(duration_s: float, events: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Lay events at their times (s) in silence of `duration_s`."""
    result = np.zeros(int(duration_s * SAMPLING_RATE), dtype=np.float64)
    for start_s, event in events:
        at = int(start_s * SAMPLING_RATE)
        part = event[: max(0, len(result) - at)]
        result[at : at + len(part)] += part
    return result


def _repeat(duration_s: float, period_s: float, event: Callable[[], np.ndarray], rng: Rng) -> np.ndarray:
    """An event again and again, about every `period_s`."""
    times, start = [], float(rng.uniform(0.02, 0.1))
    while start < duration_s - 0.05:
        times.append((start, event()))
        start += period_s * float(rng.uniform(0.9, 1.1))
    return _place(duration_s, times)


def _dog(duration_s: float, rng: Rng) -> np.ndarray:
    pitch = rng.uniform(280, 520)

    def bark() -> np.ndarray:
        t = _time(0.18)
        phase = _sweep(pitch * (1.0 + 0.6 * np.exp(-t / 0.03)) * np.exp(-t / 0.5))
        voice = sum(np.sin(k * phase) / k for k in range(1, 9)) + 0.5 * band(rng.standard_normal(len(t)), 600, 3000)
        return np.asarray(voice * np.minimum(t / 0.01, 1) * np.exp(-t / 0.05))

    return _repeat(duration_s, rng.uniform(0.35, 0.55), bark, rng)


def _bird(duration_s: float, rng: Rng) -> np.ndarray:
    pitch, depth = rng.uniform(3000, 4500), rng.uniform(600, 1200)

    def chirp() -> np.ndarray:
        t = _time(rng.uniform(0.08, 0.14))
        return np.sin(_sweep(pitch + depth * np.sin(2 * np.pi * t / 0.07))) * np.sin(np.pi * t / t[-1])

    return _repeat(duration_s, rng.uniform(0.15, 0.25), chirp, rng)


def _bell(duration_s: float, rng: Rng) -> np.ndarray:
    pitch = rng.uniform(500, 900)

    def stroke() -> np.ndarray:
        t = _time(1.2)
        partials = (
            (0.5, 0.4, 0.9),
            (1.0, 1.0, 0.6),
            (1.19, 0.6, 0.5),
            (2.0, 0.7, 0.35),
            (2.74, 0.5, 0.25),
            (4.07, 0.3, 0.12),
        )
        return np.asarray(sum(a * np.sin(2 * np.pi * pitch * r * t) * np.exp(-t / d) for r, a, d in partials))

    return _repeat(duration_s, rng.uniform(0.6, 0.9), stroke, rng)


def _rain(duration_s: float, rng: Rng) -> np.ndarray:
    noise = band(rng.standard_normal(int(duration_s * SAMPLING_RATE)), 2500, 7500)
    drops = (rng.random(len(noise)) < 60 / SAMPLING_RATE) * rng.uniform(4, 12, len(noise))
    return noise / rms(noise) + convolve(drops, 0.7 ** np.arange(30) * np.cos(np.arange(30)))[: len(noise)]


def _wind(duration_s: float, rng: Rng) -> np.ndarray:
    t = _time(duration_s)
    low = band(coloured_noise(len(t), 1.0, rng), 150, 400)
    high = band(coloured_noise(len(t), 1.0, rng), 400, 900)
    gust = 0.5 + 0.5 * np.sin(2 * np.pi * (rng.uniform(0.4, 0.8) * t + rng.random()))
    return np.asarray(low / rms(low) * (1.2 - gust) + high / rms(high) * gust)


def _engine(duration_s: float, rng: Rng) -> np.ndarray:
    t = _time(duration_s)
    rate = rng.uniform(22, 38) * (1 + 0.05 * np.sin(2 * np.pi * rng.uniform(0.3, 0.8) * t))
    phase = _sweep(rate)
    voice = sum(np.sin(k * phase + rng.uniform(0, 6)) / k**0.7 for k in range(1, 24))
    return np.asarray(voice + 0.6 * coloured_noise(len(t), 1.5, rng))


def _siren(duration_s: float, rng: Rng) -> np.ndarray:
    t = _time(duration_s)
    centre, swing = rng.uniform(850, 1100), rng.uniform(250, 400)
    phase = _sweep(centre + swing * np.sin(2 * np.pi * (rng.uniform(0.9, 1.4) * t + rng.random())))
    return np.asarray(np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.2 * np.sin(3 * phase))


def _applause(duration_s: float, rng: Rng) -> np.ndarray:
    def clap() -> np.ndarray:
        t = _time(0.03)
        return (
            band(rng.standard_normal(len(t)), 700, rng.uniform(2500, 4000)) * np.exp(-t / 0.006) * rng.uniform(0.4, 1)
        )

    return _repeat(duration_s, rng.uniform(0.02, 0.035), clap, rng)


def _knocking(duration_s: float, rng: Rng) -> np.ndarray:
    pitch = rng.uniform(110, 200)

    def knock() -> np.ndarray:
        t = _time(0.12)
        body = np.sin(2 * np.pi * pitch * t) * np.exp(-t / 0.025)
        return np.asarray(body + 0.4 * band(rng.standard_normal(len(t)), 200, 900) * np.exp(-t / 0.01))

    return _repeat(duration_s, rng.uniform(0.18, 0.26), knock, rng)


def _clock(duration_s: float, rng: Rng) -> np.ndarray:
    pitches, strokes = rng.uniform(2200, 3200) * np.array([1.0, 0.8]), iter(range(1000))

    def tick() -> np.ndarray:
        t = _time(0.02)
        return np.asarray(np.sin(2 * np.pi * pitches[next(strokes) % 2] * t) * np.exp(-t / 0.003))

    return _repeat(duration_s, rng.uniform(0.3, 0.5), tick, rng) + 0.002 * coloured_noise(
        int(duration_s * SAMPLING_RATE), 1, rng
    )


def _alarm(duration_s: float, rng: Rng) -> np.ndarray:
    t = _time(duration_s)
    high, rate = rng.uniform(1800, 2400), rng.uniform(4.5, 7)
    return np.asarray(np.sign(np.sin(_sweep(np.where((t * rate) % 1 < 0.5, high, high * 0.75)))) * 0.5)


def _horn(duration_s: float, rng: Rng) -> np.ndarray:
    pitch, length = rng.uniform(330, 420), rng.uniform(0.35, 0.6)

    def honk() -> np.ndarray:
        t = _time(length)
        voice = sum(np.sin(2 * np.pi * k * f * t) / k for f in (pitch, pitch * 1.26) for k in range(1, 8))
        return np.asarray(voice * np.minimum(np.minimum(t, length - t) / 0.02, 1))

    return _repeat(duration_s, length + 0.15, honk, rng)


SOUNDS: dict[str, Callable[[float, Rng], np.ndarray]] = {
    "dog": _dog, "bird": _bird, "bell": _bell, "rain": _rain, "wind": _wind, "engine": _engine, "siren": _siren,
    "applause": _applause, "knocking": _knocking, "clock": _clock, "alarm": _alarm, "horn": _horn,
}  # fmt: skip

SCENES: dict[str, tuple[tuple[str, float], ...]] = {
    "street": (("engine", 1.0), ("horn", 0.5)),
    "forest": (("bird", 0.8), ("wind", 0.6)),
    "beach": (("rain", 0.25), ("wind", 1.0)),
    "office": (("clock", 1.0), ("alarm", 0.12)),
    "station": (("bell", 0.7), ("engine", 0.5)),
    "workshop": (("knocking", 1.0), ("engine", 0.25)),
}
"""A scene is a mixture of sounds, with their share of the amplitude."""


def sound(name: str, duration_s: float, rng: Rng) -> np.ndarray:
    """One of `SOUNDS` -> float32 (samples,)."""
    return _peak(SOUNDS[name](duration_s, rng))


def scene(name: str, duration_s: float, rng: Rng) -> np.ndarray:
    """One of `SCENES` -> float32 (samples,)."""
    parts = [level * rng.uniform(0.8, 1.2) * sound(part, duration_s, rng) for part, level in SCENES[name]]
    return _peak(np.sum(parts, axis=0))


def beeps(count: int, rng: Rng) -> np.ndarray:
    """`count` short beeps, evenly spaced -> float32 (samples,)."""
    pitch, length, period = rng.uniform(700, 1400), rng.uniform(0.08, 0.12), rng.uniform(0.25, 0.29)
    t = _time(length)
    beep = np.sin(2 * np.pi * pitch * t) * np.minimum(np.minimum(t, length - t) / 0.01, 1)
    return _peak(_place(0.1 + count * period, [(0.05 + i * period, beep) for i in range(count)]))


def _plucked(frequency: float, duration_s: float, rng: Rng) -> np.ndarray:
    """Karplus and Strong's string: a burst of noise in a loop that averages neighbours."""
    period = SAMPLING_RATE / frequency - 0.5  # the average below delays by half a sample
    whole = int(period)
    weights = 0.4995 * np.array([1 - period % 1, 1.0, period % 1])
    burst = rng.uniform(-1, 1, whole)
    string = np.zeros(whole + 2 + int(duration_s * SAMPLING_RATE))
    string[2 : whole + 2] = burst - burst.mean()
    for start in range(whole + 2, len(string), whole):
        stop = min(start + whole, len(string))
        string[start:stop] = sum(w * string[start - whole - k : stop - whole - k] for k, w in enumerate(weights))
    return string[2 : 2 + int(duration_s * SAMPLING_RATE)]


_HARMONICS = {
    # decay of the partials, number, attack (s), decay (s), depth of vibrato, breath
    "piano": (0.9, 8, 0.005, 0.35, 0.0, 0.0),
    "flute": (2.6, 4, 0.06, 9.0, 0.004, 0.06),
    "violin": (0.55, 14, 0.09, 9.0, 0.012, 0.0),
    "trumpet": (0.15, 9, 0.03, 9.0, 0.0, 0.01),
    "organ": (0.0, 0, 0.02, 9.0, 0.0, 0.0),
}


def note(instrument: str, frequency: float, duration_s: float, rng: Rng) -> np.ndarray:
    """One note -> float32 (samples,). Instruments: those of `INSTRUMENTS`; `frequency` in Hz."""
    frequency *= 2 ** (rng.uniform(-0.15, 0.15) / 12)
    if instrument == "guitar":
        return _peak(_plucked(frequency, duration_s, rng))
    t = _time(duration_s)
    slope, count, attack_s, decay_s, vibrato, breath = _HARMONICS[instrument]
    partials = [(float(k), k**-slope) for k in range(1, count + 1)]
    if instrument == "organ":
        partials = [(0.5, 1.0), (1, 1.0), (2, 0.8), (4, 0.6), (8, 0.3)]
    phase = _sweep(frequency * (1 + vibrato * np.sin(2 * np.pi * rng.uniform(5, 6.5) * t)))
    voice = sum(
        level * rng.uniform(0.8, 1.2) * np.sin(k * phase) * np.exp(-t * k**0.5 / decay_s)
        for k, level in partials
        if k * frequency < 7600
    )
    envelope = np.minimum(t / attack_s, 1) * np.minimum((duration_s - t) / 0.05, 1)
    return _peak(voice * envelope + breath * coloured_noise(len(t), 0.5, rng) * envelope)


INSTRUMENTS = ("guitar", *_HARMONICS)
