"""Evaluations read back, side by side on a page, in Markdown and in LaTeX."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.evaluation.reporting.results import breakdown, confusion, read_result, worst
from qwen2audio_train.evaluation.reporting.results_page import render_results
from qwen2audio_train.evaluation.reporting.results_text import as_latex, as_markdown
from qwen2audio_train.evaluation.scoring.evaluate import evaluation_of, save


def evaluation(folder: Path, audio: Path, answers: dict[str, str]) -> Path:
    """The folder of an evaluation of eight transcripts and eight labels, answered by `answers` where it names them."""
    clips = [Clip(str(audio), duration) for duration in (1.0, 4.0, 12.0, 12.0)] * 2
    examples = [
        TaskExample(f"t{i}", clip, "asr", "en", "the cat sat", "librispeech_test_clean", meta={"speaker": f"s{i % 2}"})
        for i, clip in enumerate(clips)
    ]
    labels = ["dog", "rain"] * 4
    examples += [
        TaskExample(f"c{i}", clip, "sec", "en", label, "sounds")
        for i, (clip, label) in enumerate(zip(clips, labels, strict=True))
    ]
    found = evaluation_of(
        examples, [answers.get(e.id, e.target) for e in examples], {}, settings={"seed": 0}, bootstrap_samples=20
    )
    save(replace(found, caveats=("a caveat",)), folder)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    audio = tmp_path / "clip.wav"
    soundfile.write(audio, np.sin(np.arange(16_000) / 9).astype(np.float32) * 0.1, 16_000)
    first = evaluation(tmp_path / "first", audio, {"t0": "a dog", "t2": "the cat", "c0": "rain", "c1": "a <b>"})
    return [first, evaluation(tmp_path / "second", audio, {"t2": "the cat"})]


def test_what_was_written_is_read_back(folders: list[Path]) -> None:
    result = read_result("first", folders[0])
    found = {row.source: row for row in result.rows}
    asr = found["librispeech_test_clean"]
    assert (asr.score.value, asr.scoring, asr.prompt) == (4 / 24, "reference/2", "librispeech_test_clean/1")
    assert asr.published["paper"] == 0.016
    utterances = result.utterances["librispeech_test_clean", "asr", "en"]
    assert [u.item.id for u in worst(utterances, 5)] == ["t0", "t2"]
    assert utterances[2].clips[0].duration_s == 12.0


def test_errors_are_broken_down(folders: list[Path]) -> None:
    parts = breakdown(read_result("first", folders[0]).utterances["librispeech_test_clean", "asr", "en"])
    assert parts["length"] == {"00 to 02 s": (3 / 6, 2), "02 to 05 s": (0.0, 2), "10 to 20 s": (1 / 12, 4)}
    assert parts["speaker"] == {"s0": (4 / 12, 4), "s1": (0.0, 4)}


def test_a_closed_set_has_its_confusions(folders: list[Path]) -> None:
    utterances = read_result("first", folders[0]).utterances
    assert confusion(utterances["sounds", "sec", None]) == (["dog", "rain"], [[3, 1, 0], [0, 3, 1]])
    assert confusion(utterances["librispeech_test_clean", "asr", "en"]) is None


def test_the_page_holds_everything_and_escapes_it(folders: list[Path]) -> None:
    text = render_results([read_result(f.name, f) for f in folders], "A & B", num_worst=3)
    for piece in (
        "16.7 %",
        "4.2 %",
        "paper 1.6 %",
        "(+2.6)",
        "data:audio/ogg;base64,",
        "Confusions",
        "a caveat",
        "A &amp; B",
    ):
        assert piece in text, piece
    assert "a <b>" not in text
    assert "http" not in text.replace("http-equiv", ""), "nothing is loaded from elsewhere"


def test_tables_for_other_documents(folders: list[Path]) -> None:
    results = [read_result(f.name, f) for f in folders]
    markdown, latex = as_markdown(results, "Mine"), as_latex(results, "Mine_1")
    row = next(line for line in markdown.splitlines() if line.startswith("| librispeech_test_clean"))
    assert row.split("|")[3:6] == [" WER ", next(c for c in row.split("|") if "16.7 %" in c), row.split("|")[5]]
    assert r"librispeech\_test\_clean & en & WER & 16.7 \%" in latex
    assert r"\caption{Mine\_1." in latex


def test_a_folder_without_an_evaluation_is_named(tmp_path: Path, folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.json here"):
        read_result("x", tmp_path)
    (folders[0] / "texts.jsonl").write_text(json.dumps({"id": "a"}) + "\n")
    with pytest.raises(ConfigError, match="evaluate again"):
        read_result("x", folders[0])
