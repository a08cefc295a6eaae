"""Every defect that is planted in a manifest is found, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.prompts.tokenizer import save_processor
from qwen2audio_train.data.tools.check import CheckOptions, check, summary
from qwen2audio_train.data.tools.clip_facts import examine

Tone = Callable[..., Path]


def line(name: str, audio: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "audio": audio, "task": "asr", "language": "en", "target": "hello there", **fields}


def copy(source: Path, target: Path) -> None:
    """The same 16-bit samples in another format."""
    samples, rate = soundfile.read(source, dtype="int16")
    soundfile.write(target, samples, rate)


@pytest.fixture
def manifest(write_tone: Tone, write_manifest: Callable[..., Path], tmp_path: Path) -> Path:
    write_tone("good.flac")
    write_tone("other.wav", seconds=0.5)
    copy(tmp_path / "good.flac", tmp_path / "twin.wav")
    soundfile.write(tmp_path / "silent.wav", np.full(16_000, 1e-4), 16_000)
    soundfile.write(tmp_path / "loud.wav", np.sign(np.sin(np.arange(16_000) / 9)), 16_000, subtype="FLOAT")
    return write_manifest(
        [
            line("good", "good.flac", duration_s=1.0),
            line("twin", "twin.wav"),
            line("long", "other.wav", duration_s=0.7),
            line("gone", "gone.wav", duration_s=1.0),
            line("silent", "silent.wav"),
            line("loud", "loud.wav"),
            line("fast", "good.flac", duration_s=1.0, target="x" * 41),
            line("good", "loud.wav"),
            line("typo", "good.flac", taget="x"),
        ]
    )


def test_every_planted_defect_is_found(manifest: Path) -> None:
    [found] = check(CheckOptions(manifests=[str(manifest)]))
    assert sorted((item.line, item.severity, item.kind) for item in found.findings) == [
        (2, "warning", "duplicate audio"),
        (3, "error", "duration"),
        (4, "error", "audio"),
        (5, "warning", "silence"),
        (6, "warning", "clipping"),
        (7, "warning", "duplicate audio"),
        (7, "warning", "text length"),
        (8, "error", "duplicate id"),
        (8, "warning", "clipping"),
        (8, "warning", "duplicate audio"),
        (9, "error", "bad line"),
    ]
    assert (found.num_examples, found.num_errors) == (8, 4)
    assert found.seconds == pytest.approx(1.0 + 1.0 + 0.7 + 1.0 + 1.0 + 1.0 + 1.0 + 1.0)
    text = summary([found], max_shown=1)
    assert "8 examples, 0.00 h (asr 8)" in text
    assert "languages: en 8" in text
    assert "answers: 11 to 41 characters, half of them up to 11" in text
    assert "error: duration, 1 x" in text
    assert 'line 3 "long": ' in text
    assert "and 2 more" in text


def test_lines_alone(manifest: Path) -> None:
    [found] = check(CheckOptions(manifests=[str(manifest)], decode=False))
    assert [item.kind for item in found.findings] == ["duplicate id", "bad line"]


def test_held_out_audio_in_training_is_an_error(write_tone: Tone, write_manifest: Callable[..., Path]) -> None:
    """Also when the held-out copy is stored losslessly in another format."""
    path = write_tone("a.wav")
    copy(path, path.with_suffix(".flac"))
    write_tone("b.wav", seconds=2.0)
    train = write_manifest([line("a", "a.wav"), line("b", "b.wav")], "train.jsonl")
    test = write_manifest(
        [line("t", "a.flac"), line("u", "b.wav") | {"audio": {"path": "b.wav", "end_s": 1.5}}], "test.jsonl"
    )
    found, held_out = check(CheckOptions(manifests=[str(train)], against=[str(test)], num_workers=1))
    [item] = found.findings
    assert (item.severity, item.kind, item.example) == ("error", "contamination", "a")
    assert item.detail == f'the same audio as "t" ({test}:1), which is held out'
    assert held_out.findings == []
    assert "nothing to complain about" in summary([held_out], 5)


def test_answers_and_examples_that_are_too_long(
    write_tone: Tone, write_manifest: Callable[..., Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_tone("a.wav", seconds=6.0)
    save_processor(tokenizer, tmp_path / "processor")
    user = {"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}
    lines = [
        line("short", "a.wav", target="x"),
        {"id": "long", "messages": [user, {"role": "assistant", "content": "hello " * 10}]},
        {"id": "silent", "messages": [user]},
    ]
    path = str(write_manifest(lines))
    options = CheckOptions([path], max_answer_characters=50, cache_dir=str(tmp_path / "cache"))
    kinds = [(1, "text length"), (2, "long answer"), (2, "duplicate audio"), (3, "nothing to learn")]
    [found] = check(options)
    assert [(item.line, item.kind) for item in found.findings] == [*kinds, (3, "duplicate audio")]
    options.tokenizer, options.max_tokens = str(tmp_path / "processor"), 200
    [found] = check(options)
    [error] = [item for item in found.findings if item.severity == "error"]
    assert (error.line, error.kind) == (2, "too long")
    assert "150 of them audio), beyond max_tokens=200" in error.detail


def test_a_check_that_was_broken_off_goes_on(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CheckOptions([str(manifest)], num_workers=1, cache_dir=str(tmp_path / "cache"))
    whole = check(options)
    opened: list[str] = []

    def until_the_fourth(clip: Clip, recipe: SampleRecipe) -> Any:
        if len(opened) == 4:
            raise KeyboardInterrupt
        opened.append(clip.path)
        return examine(clip)

    monkeypatch.setattr("qwen2audio_train.data.tools.clip_facts.examine", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        check(options)
    monkeypatch.setattr(
        "qwen2audio_train.data.tools.clip_facts.examine",
        lambda clip, recipe: (opened.append(clip.path), examine(clip, recipe))[1],
    )
    assert check(options) == whole
    assert len(opened) == 8  # every clip once
    assert list((tmp_path / "cache" / "check").iterdir()) == []


def test_empty_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    [found] = check(CheckOptions(manifests=[str(tmp_path / "m.jsonl")]))
    assert found.num_errors == 1


def test_facts_of_a_tone(write_tone: Tone) -> None:
    facts = examine(Clip(str(write_tone("a.wav", seconds=2.0)), None))
    assert facts.duration_s == 2.0  # type: ignore[union-attr]
    assert facts.peak_dbfs == pytest.approx(20 * np.log10(0.5), abs=0.01)  # type: ignore[union-attr]
    assert facts.clipped_share == 0.0  # type: ignore[union-attr]
