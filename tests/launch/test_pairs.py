"""The commands of launch/pairs.py, through its own door."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen2audio_train.data.examples import PreferenceExample
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.prompts.tokenizer import save_processor
from tests.evaluation.tiny import MEL_BINS, noise, tiny_model, tiny_tokenizer
from tests.launch.scripts import script


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lines = []
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", noise(np.random.default_rng(number), 0.4), 16_000)
        line = {"id": f"u{number}", "audio": f"{number}.wav", "duration_s": 0.4, "task": "asr", "language": "en"}
        lines.append(json.dumps(line | {"target": f"the cat {number}"}))
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_by_rule(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rules.jsonl"
    given = (f"manifests=[{manifest}]", f"output={output}", "rules=[other_clip,segments]")
    assert script("pairs").main(["rules", *given]) == 0
    assert "14 examples, 14 pairs" in capsys.readouterr().out
    examples = read_manifest(output)
    assert all(isinstance(example, PreferenceExample) for example in examples)
    assert len(list((tmp_path / "rules.jsonl.audio").glob("*.flac"))) == 6


def test_sampled(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, output = tmp_path / "model", tmp_path / "pairs.jsonl"
    tiny_model(spread=2.0).save_pretrained(checkpoint)
    save_processor(tiny_tokenizer(), checkpoint, num_mel_bins=MEL_BINS)
    given = [f"checkpoint={checkpoint}", f"manifests=[{manifest}]", f"output={output}", "num_answers=2"]
    given += ["max_new_tokens=5", "chosen=reference", "max_length_ratio=100"]
    assert script("pairs").main(["sample", *given]) == 0
    assert "6 examples, 6 pairs" in capsys.readouterr().out
    (first, *_) = read_manifest(output)
    assert isinstance(first, PreferenceExample)
    assert first.chosen == "the cat 0"
    assert first.meta["pair"]["checkpoint"] == str(checkpoint)
    with pytest.raises(SystemExit):
        script("pairs").main(["sample", *given, "seed=1"])
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sampel"], "sampel: no such command; did you mean sample?"),
        (["rules", "output=o"], "manifests: no value was given"),
        (["rules", "manifests=[/none]", "output=o"], "No such file"),
        (["rules", "manifests=[m]", "output=o", "rule=[x]"], "rule: unknown key; did you mean rules?"),
        (["sample", "manifests=[m]", "output=o"], "checkpoint: no value was given"),
        (["sample", "checkpoint=c", "manifests=[m]", "output=o", "score=wer"], "score=wer: expected one of"),
        (["sample", "checkpoint=c", "manifests=[m]", "output=o", "score=judge"], "judge.base_url: no value"),
    ],
)
def test_what_cannot_be_run(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("pairs").main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert script("pairs").main(["--help"]) == 0
    assert "launch/pairs.py sample" in capsys.readouterr().out
    assert script("pairs").main([]) == 2
