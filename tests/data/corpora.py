"""Small corpora on disk for the tests of the loader: tones of known lengths, and their manifests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from qwen2audio_train.config.data import DataConfig, SourceConfig
from qwen2audio_train.data.loading.indexed import PackLoader
from qwen2audio_train.data.samples.collate import Batch


def write_corpus(folder: Path, name: str, seconds: Sequence[float]) -> Path:
    """A manifest of clips; clip i is a tone of its own frequency."""
    (folder / name).mkdir(parents=True)
    lines = []
    for i, duration in enumerate(seconds):
        times = np.arange(round(duration * 16_000)) / 16_000
        soundfile.write(folder / name / f"{i}.wav", 0.4 * np.sin(2 * np.pi * (200 + 7 * i) * times), 16_000)
        lines.append(asr_line(f"{name}/{i}", f"{name}/{i}.wav", duration, f"hello {i}"))
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def asr_line(id: str, audio: str, duration_s: float, target: str) -> dict[str, Any]:
    return {"id": id, "audio": audio, "duration_s": duration_s, "task": "asr", "language": "en", "target": target}


def two_sources(folder: Path, num_a: int = 60, num_b: int = 25) -> dict[str, SourceConfig]:
    """Two sources with clips of 0.1 .. 0.6 s."""
    rng = np.random.default_rng(0)
    return {
        name: SourceConfig(path=[str(write_corpus(folder, name, rng.uniform(0.1, 0.6, num).round(3).tolist()))])
        for name, num in (("a", num_a), ("b", num_b))
    }


def small_config(folder: Path, sources: dict[str, SourceConfig], **kwargs: Any) -> DataConfig:
    small = {"tokens_per_pack": 120, "packs_per_step": 3, "window_examples": 32, "num_workers": 0, "seed": 1}
    return DataConfig(sources=sources, cache_dir=str(folder / "cache"), **(small | kwargs))  # type: ignore[arg-type]


def take_steps(loaders: Sequence[PackLoader], num_steps: int) -> list[list[list[Batch]]]:
    """Batches [step][rank][i] of the ranks' loaders."""
    streams = [iter(loader) for loader in loaders]
    return [
        [
            [next(stream) for _ in range(loader.batches_per_step)]
            for stream, loader in zip(streams, loaders, strict=True)
        ]
        for _ in range(num_steps)
    ]


def fingerprint(batch: Batch) -> tuple[bytes, ...]:
    """All of a batch, comparable and sortable."""
    return tuple(np.asarray(batch[key]).tobytes() for key in sorted(batch))


def is_filler(batch: Batch) -> bool:
    return batch["target"].numel() == 0


def step_content(step: list[list[Batch]]) -> list[tuple[bytes, ...]]:
    """The packs of a step over all ranks, whichever rank has them; fillers left out."""
    return sorted(fingerprint(batch) for rank in step for batch in rank if not is_filler(batch))


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
