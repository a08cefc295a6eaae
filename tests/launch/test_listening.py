"""`launch/evaluate.py listening=true`: the same questions under silence and another's clip, in the same table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

from qwen2audio_train.config.tools import EvaluateConfig
from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.evaluation.reporting.results import read_result
from qwen2audio_train.export import export
from tests.evaluation.tiny import SAMPLES, noise, tiny_model, tiny_tokenizer
from tests.launch.scripts import script


def test_what_is_answered_without_the_right_audio_stands_below_each_source(tmp_path: Path) -> None:
    lines = []
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", noise(np.random.default_rng(i), 0.5 + i / 5), 16_000)
        example = TaskExample(f"e{i}", Clip(str(tmp_path / f"{i}.wav"), None), "asr", "en", "the cat", f"set{i % 2}")
        lines.append(json.dumps(to_record(example, tmp_path)) + "\n")
    (tmp_path / "dev.jsonl").write_text("".join(lines))
    export(tiny_model(), tiny_tokenizer(), SAMPLES, tmp_path / "model")
    folder = str(tmp_path / "scores")
    config = EvaluateConfig(str(tmp_path / "model"), {"dev": str(tmp_path / "dev.jsonl")}, output_dir=folder)
    config.listening, config.max_new_tokens, config.bootstrap_samples = True, 4, 10
    script("evaluate").main(config)
    rows = [(row.source, row.kind) for row in read_result("x", folder).rows if row.score.metric == "wer"]
    assert rows == [(name, heard) for name in ("set0", "set1") for heard in ("", "silence", "swapped")]
