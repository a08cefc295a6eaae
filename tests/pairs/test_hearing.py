"""The filter of what can be answered deaf: which examples stay, and a whole run with a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from launch import pairs
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.manifests.manifest import parse_record, read_manifest
from qwen2audio_train.data.samples.recipe import save_inputs
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.pairs.candidates import CandidateFile, Candidates
from qwen2audio_train.pairs.hearing import HearingOptions, sift
from qwen2audio_train.pairs.score import scorer
from tests.evaluation.tiny import SAMPLES, noise, tiny_model, tiny_tokenizer


def examples(folder: Path) -> list[Example]:
    soundfile.write(folder / "a.wav", noise(np.random.default_rng(0), 0.4), 16_000)
    lines = [
        *(
            {"id": f"q{i}", "audio": "a.wav", "task": "aqa", "question": "Who sat?", "target": "the cat"}
            for i in range(4)
        ),
        {"id": "text", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}]},
        {"id": "open", "messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]},
    ]
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [parse_record(line, str(folder / "m.jsonl"), 1) for line in lines]


@pytest.mark.parametrize(("most", "left"), [(0.0, ["q1", "q2"]), (0.25, ["q2"]), (1.0, [])])
def test_what_is_answered_deaf_is_left_out(most: float, left: list[str], tmp_path: Path) -> None:
    file = CandidateFile(tmp_path / "answers", {})
    answers = {"q0": ["a dog"] * 4, "q1": ["The cat.", "x", "y", "z"], "q2": ["the cat"] * 2 + ["x"] * 2}
    file.add([Candidates(name, tuple(texts)) for name, texts in answers.items()])  # q3 could not be asked
    known = examples(tmp_path)
    found = sift(known, file, scorer("auto"), HearingOptions(max_right=most))
    assert [example.id for example in found.left_out] == left
    assert [example.id for example in found.kept] == [e.id for e in known if e.id not in left]
    assert (found.counts["without a clip"], found.counts["not asked"]) == (1, 2)
    assert found.counts["failed deaf"] + found.counts["answered deaf, left out"] == 3


def test_a_run_asks_about_silence_and_writes_both_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = examples(tmp_path)
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "model")
    save_inputs(tokenizer, SAMPLES, tmp_path / "model")
    silent = LazySamples(known, tokenizer, SAMPLES, for_generation=True, audio="silence")[0]
    assert silent is not None
    assert silent.mels[0].std() < 1e-6 or len(np.unique(silent.mels[0])) <= 2  # zeros, and the padding's own zero
    asked = ["hearing", f"checkpoint={tmp_path / 'model'}", f"manifests=[{tmp_path}/m.jsonl]", "num_answers=2"]
    given = ["max_new_tokens=3", "right_from=0", f"output={tmp_path}/heard.jsonl"]  # any answer at all counts as right
    assert pairs.main([*asked, *given]) == 0
    assert "2 examples kept; answered deaf, left out 4, not asked 1, without a clip 1" in capsys.readouterr().out
    assert [example.id for example in read_manifest(tmp_path / "heard.jsonl")] == ["text", "open"]
    assert [example.id for example in read_manifest(tmp_path / "heard.jsonl.left_out")] == ["q0", "q1", "q2", "q3"]
    settings = json.loads((tmp_path / "heard.jsonl.answers").read_text().splitlines()[0])["settings"]
    assert settings["audio"] == "silence"
