"""Other families through transformers' classes: tiny random models, and Whisper's real weights where they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.evaluation.backends.transformers import TransformersOptions, evaluate_transformers, load_stock
from qwen2audio_train.evaluation.scoring.asked import asked_by
from qwen2audio_train.evaluation.scoring.items import item_of
from tests.evaluation.backends import stock_models
from tests.evaluation.tiny import noise

WRITERS: dict[str, Callable[[Path], None]] = {
    "qwen2_audio": stock_models.write_qwen2_audio,
    "whisper": stock_models.write_whisper,
    "qwen2_5_omni": partial(stock_models.write_omni, generation=2),
    "qwen3_omni": partial(stock_models.write_omni, generation=3),
    "qwen3_asr": stock_models.write_qwen3_asr,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, write in WRITERS.items():
        torch.manual_seed(0)
        write(folder / name)
    return folder


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Transcripts of 0.5 s and of 31 s, a translation, a class."""
    rng = np.random.default_rng(0)
    kinds = [("asr", "en", None, 0.5), ("asr", "de", None, 31.0), ("s2tt", "de", "en", 0.7), ("ser", "en", None, 0.9)]
    lines = []
    for i, (task, language, text_language, seconds) in enumerate(kinds):
        soundfile.write(tmp_path / f"{i}.wav", noise(rng, seconds), 16_000)
        clip = Clip(str(tmp_path / f"{i}.wav"), seconds)
        example = TaskExample(f"e{i}", clip, task, language, "the cat", "dev", text_language)
        lines.append(json.dumps(to_record(example, tmp_path)) + "\n")
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(lines))
    return path


def options(manifest: Path, model: Path, **given: Any) -> TransformersOptions:
    out = str(manifest.parent / "out")
    return TransformersOptions(
        {"dev": str(manifest)}, out, bootstrap_samples=10, model=str(model), **{"max_new_tokens": 4, **given}
    )


@pytest.mark.parametrize(
    ("family", "answered", "cut", "stamp"),
    [
        ("qwen2_audio", ["e0", "e2", "e3"], "the first 30 s", None),
        ("whisper", ["e0", "e1", "e2"], None, "whisper/1"),
        ("qwen2_5_omni", ["e0", "e2", "e3"], "the first 2 s", "words/1"),
        ("qwen3_omni", ["e0", "e1", "e2", "e3"], None, "words/1"),
        ("qwen3_asr", ["e0", "e1"], None, "qwen3_asr/1"),
    ],
)
def test_a_family_answers_what_it_hears_to_the_end_and_the_rest_is_named(
    family: str, answered: list[str], cut: str | None, stamp: str | None, models: Path, manifest: Path
) -> None:
    found = evaluate_transformers(options(manifest, models / family))
    assert [record["id"] for record in found.texts] == answered
    own = {asked_by(example) for example in read_manifest(manifest) if example.id in answered}
    assert {row.prompt for row in found.rows} == (own if stamp is None else {stamp})
    if cut is None:
        assert found.failed == {}
    else:
        assert list(found.failed) == ["e1"]
        assert f"a clip of 31.0 s, of which the stock processor hears {cut}" in found.failed["e1"]
    asked_less = "examples were not asked: this family does not do" in "".join(found.caveats)
    assert asked_less == (family in ("whisper", "qwen3_asr"))


@pytest.mark.parametrize("family", WRITERS)
def test_an_answer_depends_on_the_clip_and_on_nothing_else(family: str, models: Path, manifest: Path) -> None:
    """The same model asked again gives the same text; another clip under the same words gives other logits."""
    first = evaluate_transformers(options(manifest, models / family))
    (manifest.parent / "out" / "answers.0.jsonl").unlink()
    again = evaluate_transformers(options(manifest, models / family))
    assert first.texts == again.texts
    stock = load_stock(str(models / family))
    heard = []
    for seed in (1, 2, 1):
        soundfile.write(manifest.parent / "x.wav", noise(np.random.default_rng(seed), 0.6), 16_000)
        example = TaskExample("x", Clip(str(manifest.parent / "x.wav"), 0.6), "asr", "en", "", "dev")
        settings = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        heard.append(scores_of(stock, example, settings))
    assert torch.equal(heard[0], heard[2])
    assert not torch.equal(heard[0], heard[1])


def scores_of(stock: Any, example: TaskExample, settings: dict[str, Any]) -> torch.Tensor:
    waveforms = [load_clip(example.clip, SampleRecipe())]
    inputs, own = stock.asked.ask(stock.processor, example, item_of(example), waveforms)
    out = stock.model.generate(**inputs, **settings, **own)
    scores = out.scores[0]
    return torch.where(scores.isfinite(), scores, 0.0)


def test_answers_are_kept_and_not_asked_for_again(
    models: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(manifest, models / "whisper")
    first = evaluate_transformers(chosen)
    monkeypatch.setattr("qwen2audio_train.evaluation.backends.transformers.Stock.answer", None)
    assert evaluate_transformers(chosen).texts == first.texts
    with pytest.raises(TypeError):
        evaluate_transformers(options(manifest, models / "whisper", max_new_tokens=3))


@pytest.mark.parametrize(
    ("model", "given", "says"),
    [
        ("", {}, "model: no value was given"),
        ("nowhere", {}, "transformers cannot read it"),
        ("other", {}, "of the family bert"),
        ("whisper", {"max_new_tokens": 445}, "448 positions, of which 4 are its prompt's; give up to 444"),
    ],
)
def test_a_model_that_cannot_be_had_is_said(
    model: str, given: dict[str, Any], says: str, models: Path, manifest: Path
) -> None:
    (models / "other").mkdir(exist_ok=True)
    (models / "other" / "config.json").write_text('{"model_type": "bert"}')
    chosen = options(manifest, models / model if model else Path(), **given)
    chosen.model = str(models / model) if model else ""
    with pytest.raises(ConfigError, match=says):
        evaluate_transformers(chosen)


@pytest.mark.parts
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("QWEN2AUDIO_PARTS"), reason="QWEN2AUDIO_PARTS names no folder")
def test_whisper_transcribes_clips_of_a_person_and_all_of_a_longer_one(tmp_path: Path) -> None:
    clips = sorted(Path(os.environ["QWEN2AUDIO_CLIPS"]).rglob("*.ogg"))[:6]
    waveforms = [soundfile.read(path, dtype="float32")[0] for path in clips]
    soundfile.write(tmp_path / "long.wav", np.concatenate(waveforms), 16_000)
    lines = [(str(path), len(waveform) / 16_000) for path, waveform in zip(clips, waveforms, strict=True)]
    lines.append((str(tmp_path / "long.wav"), sum(seconds for _, seconds in lines)))
    examples = [TaskExample(str(i), Clip(path, s), "asr", "en", "x", "dev") for i, (path, s) in enumerate(lines)]
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(to_record(example, tmp_path)) + "\n" for example in examples))
    model = Path(os.environ["QWEN2AUDIO_PARTS"]) / "whisper_base"
    found = evaluate_transformers(options(path, model, max_new_tokens=224))
    *short, whole = [record["text"].split() for record in found.texts]
    assert lines[-1][1] > 40
    assert sum(map(len, short)) > 60
    assert abs(len(whole) - sum(map(len, short))) < 0.1 * len(whole), "what is heard in parts is heard in the whole"
