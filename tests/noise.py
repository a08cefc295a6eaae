"""A corpus of noise in every form of manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

WORDS = ["red", "green", "blue", "grey", "white", "black", "brown", "pink"]


def write_noise(folder: Path) -> Path:
    """Manifests `speech`, `sound` (one-word labels), `text` (no audio) and `pairs` over clips of noise."""
    rng = np.random.default_rng(0)

    def clip(name: str) -> dict[str, Any]:
        seconds = round(float(rng.uniform(0.1, 0.6)), 2)
        soundfile.write(folder / f"{name}.wav", rng.normal(0, 0.1, round(seconds * 16_000)), 16_000)
        return {"audio": f"{name}.wav", "duration_s": seconds}

    def words() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(2, 7)))

    speech = [{"id": f"a{i}", **clip(f"a{i}"), "task": "asr", "language": "en", "target": words()} for i in range(24)]
    sound = [{"id": f"b{i}", **clip(f"b{i}"), "task": "sec", "target": str(rng.choice(WORDS))} for i in range(12)]
    text = [{"id": f"c{i}", "messages": _turn("user", words()) + _turn("assistant", words())} for i in range(12)]
    pairs = [
        {
            "id": f"d{i}",
            "prompt": _turn("user", [{"type": "audio", **clip(f"d{i}")}, {"type": "text", "text": words()}]),
            "chosen": f"yes {words()}",
            "rejected": f"no {words()}",
        }
        for i in range(12)
    ]
    for name, lines in (("speech", speech), ("sound", sound), ("text", text), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _turn(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]
