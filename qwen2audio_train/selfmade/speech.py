"""Speech from espeak-ng, called through ctypes: a few milliseconds a sentence, the same bytes every time."""

from __future__ import annotations

import _ctypes
import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import soxr

from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.layout import SAMPLING_RATE

_SYNCHRONOUS, _UTF8, _FROM_CHARACTER = 2, 1, 1  # espeak/speak_lib.h
_RATE, _PITCH, _RANGE = 1, 3, 4
_IPA = 2
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

LANGUAGE_VOICES = {"en": "gmw/en", "de": "gmw/de", "zh": "sit/cmn", "fr": "roa/fr", "es": "roa/es", "it": "roa/it"}
"""espeak-ng's file for each of our languages: by path, since a search by name opens them all, which takes 3 ms."""

VOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "female": ("f1", "f3", "f4", "f5", "Annie", "Alicia", "anika", "aunty", "grandma", "shelby"),
        "male": (
            *("m1", "m3", "m4", "m5", "m7", "m8", "Alex", "Andy", "Mario", "Michael", "Mike", "Diogo", "michel"),
            *("john", "max", "pablo", "pedro", "robert", "sandro", "travis", "victor"),
        ),
    },
    "dev": {
        "female": ("f2", "Andrea", "belinda", "linda", "steph", "steph2"),
        "male": ("m2", "m6", "Gene", "Denis", "antonio", "gustave"),
    },
}
"""espeak-ng's voice variants by split and gender. Variants that are copies of one another are on the same side; robot,
whisper and Klatt voices are left out (some of them are not reproducible)."""


@cache
def _loader() -> Any:
    try:
        import espeakng_loader
    except ImportError as error:
        raise MissingLibraryError(
            "the self-made corpus needs the speech synthesiser espeak-ng (package espeakng-loader): "
            "pip install 'qwen2audio-train[demo]'"
        ) from error
    return espeakng_loader


def check_installed() -> None:
    """Raise a MissingLibraryError that names the extra to install, where espeak-ng is missing."""
    _loader()


def gender_of(voice: str) -> str:
    """Gender of a voice of `VOICES`: `female` or `male`."""
    for genders in VOICES.values():
        for gender, names in genders.items():
            if voice in names:
                return gender
    raise ValueError(f"unknown voice {voice!r}; expected one of {VOICES}")


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"espeak-ng failed to {what}; expected the library and voices of espeakng-loader >= 0.2")


def _raw(text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> tuple[np.ndarray, int]:
    """int16 samples and their sampling rate."""
    chunks: list[np.ndarray] = []

    def receive(samples: object, count: int, _events: object) -> int:
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback, encoded = _CALLBACK(receive), text.encode()
    with _espeak(voice) as (espeak, sampling_rate):
        espeak.espeak_SetSynthCallback(callback)
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            espeak.espeak_SetParameter(parameter, value, 0)
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
        status = espeak.espeak_Synth(encoded, len(encoded) + 1, 0, _FROM_CHARACTER, 0, _UTF8, None, None)
        _check(status == 0, f"speak {text!r}")
    _check(bool(chunks), f"speak {text!r} with the voice {voice!r}")
    return np.concatenate(chunks), sampling_rate


@contextmanager
def _espeak(voice: str) -> Iterator[tuple[Any, int]]:
    """The library with a voice set, and its sampling rate.

    It is loaded afresh for every use: it keeps the phases of its oscillators from one sentence to the next, so that
    otherwise the same sentence comes out different each time.
    """
    espeak = ctypes.CDLL(_loader().get_library_path())
    try:
        sampling_rate = espeak.espeak_Initialize(_SYNCHRONOUS, 500, str(_loader().get_data_path()).encode(), 0)
        _check(sampling_rate > 0, "start")
        _check(espeak.espeak_SetVoiceByName(voice.encode()) == 0, f"find the voice {voice!r}")
        yield espeak, sampling_rate
        espeak.espeak_Terminate()
    finally:
        _ctypes.dlclose(espeak._handle)


def phonemes(texts: Sequence[str], voice: str) -> list[str]:
    """espeak-ng's phonemes (IPA) of each text."""
    found = []
    with _espeak(voice) as (espeak, _):
        espeak.espeak_TextToPhonemes.restype = ctypes.c_char_p
        for text in texts:
            left, parts = ctypes.c_char_p(text.encode()), []
            while left.value:  # one clause at a time
                parts.append(espeak.espeak_TextToPhonemes(ctypes.byref(left), _UTF8, _IPA).decode().strip())
            found.append(" ".join(parts))
    return found


def trim(waveform: np.ndarray, *, floor_db: float = -40.0, margin_s: float = 0.05) -> np.ndarray:
    """Cut leading and trailing stretches more than `floor_db` below the loudest 10 ms, but for `margin_s`."""
    hop = SAMPLING_RATE // 100
    frames = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    power = (frames.astype(np.float64) ** 2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (floor_db / 10))
    margin = int(margin_s * SAMPLING_RATE)
    return waveform[max(0, loud[0] * hop - margin) : (loud[-1] + 1) * hop + margin]


def synthesise(
    text: str, language: str, voice: str, *, rate: int = 200, pitch: int = 50, pitch_range: int = 50
) -> np.ndarray:
    """Speak `text` -> float32 (samples,) at 16 kHz in [-1, 1], silence trimmed to 50 ms.

    Args:
        language: a key of `LANGUAGE_VOICES`.
        voice: a variant of `VOICES`.
        rate: words per minute.
        pitch, pitch_range: 0 to 99, relative to the voice's own.
    """
    samples, sampling_rate = _raw(text, f"{LANGUAGE_VOICES[language]}+{voice}", rate, pitch, pitch_range)
    waveform = soxr.resample(samples.astype(np.float32) / 32768.0, sampling_rate, SAMPLING_RATE)
    return trim(waveform)
