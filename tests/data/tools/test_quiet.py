"""Recordings of nothing: what they sound like, how they are asked about, and the same files from the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch import data as script
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import ChatExample, clips_of
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.tools.check import CheckOptions, check
from qwen2audio_train.data.tools.quiet import QuietOptions, quiet, write_quiet


def test_a_third_is_silence_and_every_question_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "quiet.jsonl"
    given = [f"output={path}", "number=24", "longest_s=2.0"]
    assert script.main(["quiet", *given]) == 0
    examples = read_manifest(path)
    loud = []
    for example in examples:
        assert isinstance(example, ChatExample)
        assert (example.meta["no_speech"], example.messages[-1].content) == (True, ("Nothing was said.",))
        wave, rate = soundfile.read(clips_of(example)[0].path)
        assert rate == 16_000
        assert len(wave) / rate == clips_of(example)[0].duration_s
        assert 0.5 <= len(wave) / rate <= 2.0
        loud.append(wave.std())
    assert [level == 0 for level in loud] == [True, False, False] * 8
    assert 1e-4 < np.median([level for level in loud if level]) < 0.1
    modes = [example.mode for example in examples if isinstance(example, ChatExample)]
    assert (modes.count("voice_chat"), modes.count("analysis")) == (6, 18)
    (checked,) = check(CheckOptions(manifests=[str(path)]))
    assert checked.num_errors == 0
    again = tmp_path / "again" / "quiet.jsonl"
    write_quiet(QuietOptions(str(again), number=24, longest_s=2.0))
    assert again.read_bytes() == path.read_bytes()
    for file in (tmp_path / "quiet.jsonl.audio").iterdir():
        assert file.read_bytes() == (again.parent / "quiet.jsonl.audio" / file.name).read_bytes()


def test_noise_is_as_loud_as_drawn_and_never_clips_away(tmp_path: Path) -> None:
    levels = [20 * np.log10(quiet(1.0, True, np.random.default_rng(i)).std()) for i in range(60)]
    assert -75.5 < min(levels) < -65
    assert -30 < max(levels) < -19.5
    with pytest.raises(ConfigError, match="shortest_s=3 is above longest_s=2"):
        write_quiet(QuietOptions(str(tmp_path / "q.jsonl"), shortest_s=3.0, longest_s=2.0))
