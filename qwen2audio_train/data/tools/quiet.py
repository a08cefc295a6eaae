"""Recordings in which nobody speaks, with the answer that nothing was said: against words that are made up.

A third is digital silence, the rest noise between white and brown, from the hiss of a quiet room to a loud one. Asked
as voice chat (no text at all), in words for a transcript, and in words for an answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.data import MAX_SEED
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.storage.files import write_whole
from qwen2audio_train.layout import MIN_DURATION_S, SAMPLING_RATE

QUESTIONS = ("", "What does the speaker say?", "Transcribe this recording.", "Answer the question in the recording.")


@dataclass
class QuietOptions:
    """The keys of `launch/data.py quiet`.

    Attributes:
        output: manifest in chat form to write; the recordings lie beside it, in `<output>.audio/`.
        number: recordings.
        shortest_s, longest_s: their lengths in seconds.
        answer: what the model is to say.
        seed: of lengths, loudness and noise.
    """

    output: str = "???"
    number: int = at_least(1, 200)
    shortest_s: float = at_least(MIN_DURATION_S, 0.5)
    longest_s: float = at_least(MIN_DURATION_S, 10.0, 30)
    answer: str = "Nothing was said."
    seed: int = at_least(0, 0, MAX_SEED)


def write_quiet(options: QuietOptions) -> int:
    """Write the recordings and their manifest; their number. The same seed gives the same files.

    Raises:
        ConfigError: the shortest is longer than the longest.
    """
    if options.shortest_s > options.longest_s:
        raise ConfigError(f"shortest_s={options.shortest_s:g} is above longest_s={options.longest_s:g}")
    target = Path(options.output)
    folder = target.with_name(f"{target.name}.audio")
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(options.number):
        rng = np.random.default_rng([options.seed, number])
        seconds = rng.uniform(options.shortest_s, options.longest_s)
        soundfile.write(folder / f"{number:05d}.flac", quiet(seconds, number % 3 > 0, rng), SAMPLING_RATE)
        lines.append(json.dumps(_line(number, folder.name, seconds, options.answer), ensure_ascii=False) + "\n")
    write_whole(target, lines)
    return options.number


def quiet(seconds: float, noisy: bool, rng: np.random.Generator) -> np.ndarray:
    """(n,) float32: zeros, or noise whose power falls as frequency ** -a, a from 0 to 2, at -75 to -20 dB."""
    length = round(seconds * SAMPLING_RATE)
    if not noisy:
        return np.zeros(length, np.float32)
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(np.fft.rfftfreq(length, 1 / SAMPLING_RATE), 20.0) ** (-rng.uniform(0, 2) / 2)
    noise = np.fft.irfft(spectrum, length)
    loudness = 10 ** (rng.uniform(-75, -20) / 20)
    return np.clip(noise / noise.std() * loudness, -1, 1).astype(np.float32)


def _line(number: int, folder: str, seconds: float, answer: str) -> dict[str, Any]:
    question = QUESTIONS[number // 3 % len(QUESTIONS)]
    duration = round(seconds * SAMPLING_RATE) / SAMPLING_RATE
    clip = {"type": "audio", "audio": f"{folder}/{number:05d}.flac", "duration_s": duration}
    asked = [clip, {"type": "text", "text": question}] if question else [clip]
    return {
        "id": f"quiet/{number:05d}",
        "mode": "analysis" if question else "voice_chat",
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}],
        "meta": {"no_speech": True},
    }
