"""How an example became a sample in training is how it becomes one in evaluation, in pairs and after an export."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from qwen2audio_train.cli.compose import launch
from qwen2audio_train.config.data import LabelledTurns, LongAudio, PromptStyle, SampleRecipe, Timestamps
from qwen2audio_train.config.schema import ConfigError, Dtype
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.samples.recipe import FILE, MODEL_KEYS, overridden, plain, saved_recipe
from qwen2audio_train.evaluation.decoding import lazy_samples
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.evaluation.scoring.evaluate import evaluate
from qwen2audio_train.export import export
from qwen2audio_train.training.stages.policy import load_for_inference
from tests.launch.scripts import SCHEMAS, script
from tests.launch.test_mistakes import tiny
from tests.runs import recipe, train

OTHER = SampleRecipe(
    prompt_style=PromptStyle.hierarchical_tags,
    prompt_seed=3,
    timestamps=Timestamps.tokens,
    prompts_per_task=2,
    labelled_turns=LabelledTurns.last,
    long_audio=LongAudio.reject,
    num_mel_bins=16,
    cache_dir="elsewhere",
    cache_max_gib=0.5,
    network_retries=1,
    network_timeout_s=2.5,
    decode_timeout_s=60.0,
)
FIELDS = [field.name for field in dataclasses.fields(SampleRecipe) if field.name != "family"]
Call = Callable[..., str]


@pytest.fixture(scope="module")
def trained(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose every choice about samples is not the default."""
    run_dir = tmp_path_factory.mktemp("other") / "run"
    chosen = [
        f"data.{name}={getattr(value, 'value', value)}"
        for name, value in dataclasses.asdict(OTHER).items()
        if name not in (*MODEL_KEYS, "cache_dir")
    ]
    here = f"data.cache_dir={run_dir.parent}/elsewhere"
    room = "model.vocab_size=3800"  # for 3 001 times
    train(recipe(noise, run_dir, *chosen, here, room, "trainer.max_steps=1", sources=["speech"]))
    return run_dir


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """call("evaluate", "key=value", ...) -> what a launch script prints, or its error."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            launch(script(name).main, name, SCHEMAS[name])
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def scored_by(trained: Path, noise: Path, tmp_path_factory: pytest.TempPathFactory) -> list[SampleRecipe]:
    """The recipes that evaluation made its samples by."""
    folder = tmp_path_factory.mktemp("scored")
    used: list[SampleRecipe] = []
    materialise = lazy_samples.materialise

    def spy(example: Any, tokenizer: Any, samples: SampleRecipe, **kwargs: Any) -> Any:
        used.append(samples)
        return materialise(example, tokenizer, samples, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_samples, "materialise", spy)
        arguments = [f"checkpoint={trained}", f"manifests.dev={noise}/speech.jsonl", f"output_dir={folder}"]
        patch.setattr(sys, "argv", ["evaluate.py", *arguments, "max_examples=2", "max_new_tokens=2", "num_threads=1"])
        launch(script("evaluate").main, "evaluate", SCHEMAS["evaluate"])
    settings = json.loads((folder / "metrics.json").read_text())["settings"]["sample"]
    assert settings["prompt_style"] == "hierarchical_tags"
    return used


@pytest.mark.parametrize("field", FIELDS)
def test_evaluation_makes_samples_as_training_did(scored_by: list[SampleRecipe], trained: Path, field: str) -> None:
    wanted = f"{trained.parent}/elsewhere" if field == "cache_dir" else getattr(OTHER, field)
    assert getattr(OTHER, field) != getattr(SampleRecipe(), field)
    assert {getattr(samples, field) for samples in scored_by} == {wanted}


def test_an_export_carries_the_recipe_and_fields_are_overridden_by_name(trained: Path, tmp_path: Path) -> None:
    loaded = load_for_inference(str(trained))
    assert loaded.caveats == ()
    again = load_for_inference(
        str(export(loaded.model, loaded.tokenizer, loaded.samples, tmp_path)), samples={"prompt_seed": 4}
    )
    assert again.samples == dataclasses.replace(loaded.samples, prompt_seed=4)
    assert again.caveats == ("sample.prompt_seed=4, where the checkpoint was trained with 3",)
    (tmp_path / FILE).unlink()
    older = load_for_inference(str(tmp_path))
    assert older.samples == SampleRecipe(num_mel_bins=16)
    assert f"{tmp_path} has no {FILE}, so samples are made with prompt_style=natural" in older.caveats[0]


def test_the_type_of_the_weights_is_that_of_the_saved_ones_unless_asked_for(trained: Path, tmp_path: Path) -> None:
    loaded = load_for_inference(str(trained))
    folder = export(loaded.model.bfloat16(), loaded.tokenizer, loaded.samples, tmp_path)
    found = [load_for_inference(str(folder), dtype=dtype).model.dtype for dtype in (None, Dtype.float32)]
    assert [loaded.model.dtype, *found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert load_for_inference(str(trained)).model.dtype == torch.float32


def test_clips_over_30_s_are_counted_in_the_results(trained: Path, noise: Path, tmp_path: Path, call: Call) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(31 * 16_000), 16_000)
    known = json.loads((noise / "speech.jsonl").read_text().splitlines()[0])
    lines = [known | {"audio": f"{noise}/{known['audio']}"}, known | {"id": "long", "audio": f"{tmp_path}/long.wav"}]
    lines[1].pop("duration_s")
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [f"checkpoint={trained}", f"manifests.dev={tmp_path}/dev.jsonl", "max_new_tokens=2", "num_threads=1"]
    rejected = call("evaluate", *given, "dtype=bfloat16", f"output_dir={tmp_path}/rejected")
    split = call("evaluate", *given, "sample.long_audio=split", f"output_dir={tmp_path}/split")
    assert "1 of 2 examples hold a clip over 30 s; they were left out" in rejected
    assert "1 of 2 examples hold a clip over 30 s; all of it was heard" in split
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("rejected", "split")]
    assert [sorted(found["failed"]) for found in metrics] == [["long"], []]
    assert [found["settings"]["dtype"] for found in metrics] == ["bfloat16", "float32"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"promt_style": "natural"}, r"^sample\.promt_style: unknown key; did you mean sample.prompt_style\?"),
        ({"prompt_style": "tags"}, r"^sample\.prompt_style: 'tags' is no choice"),
        ({"network_retries": -1}, r"^sample\.network_retries: -1 is too small; expected 0 or more"),
        ({"num_mel_bins": 80}, r"^sample\.num_mel_bins: unknown key"),
        ({"tokens_per_pack": 80}, r"^sample\.tokens_per_pack: unknown key"),
    ],
)
def test_what_no_recipe_has_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(OTHER, given)


def test_a_saved_recipe_is_read_as_it_was(tmp_path: Path) -> None:
    assert saved_recipe(tmp_path) is None
    (tmp_path / FILE).write_text(json.dumps(plain(OTHER)))
    assert saved_recipe(tmp_path) == OTHER
    (tmp_path / FILE).write_text("[1, 2]")
    with pytest.raises(ConfigError, match="no recipe of samples"):
        saved_recipe(tmp_path)


@pytest.mark.slow
def test_the_ablation_with_tags_is_scored_with_its_own_tags(call: Call, noise: Path, tmp_path: Path) -> None:
    """Three tasks over the same clips: only the prompt says what is asked."""
    clips = [json.loads(line) for line in (noise / "speech.jsonl").read_text().splitlines()][:6]
    lines = [
        {"id": f"{task}{clip['id']}", "audio": f"{noise}/{clip['audio']}", "duration_s": clip["duration_s"]}
        | {"task": task, "language": "en", "target": target}
        for clip in clips
        for task, target in (("asr", "hello there"), ("lid", "english"), ("sgc", "male"))
    ]
    manifest = tmp_path / "tags.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    call(
        *("pretrain", "model=tiny", *tiny(noise, run), "~data.sources.noise", f"data.sources.s.path=[{manifest}]"),
        *("ablation=hierarchical_tags", "trainer.max_steps=60", "trainer.learning_rate=1e-2", "data.packs_per_step=4"),
    )
    given = [f"checkpoint={run}", f"manifests.dev={manifest}", "num_threads=1", "max_new_tokens=16"]
    own = call("evaluate", *given, f"output_dir={tmp_path}/own")
    natural = call("evaluate", *given, f"output_dir={tmp_path}/natural", "sample.prompt_style=natural")
    loaded = load_for_inference(str(run))
    tags = SampleRecipe(num_mel_bins=16, prompt_style=PromptStyle.hierarchical_tags, cache_dir=f"{noise}/cache")
    through_its_own = evaluate(
        *(loaded.model, loaded.tokenizer, read_manifest(manifest), tags), decoding=Decoding(max_new_tokens=16)
    )

    def metrics(name: str) -> Any:
        return json.loads((tmp_path / name / "metrics.json").read_text())

    values = {(row["task"], row["score"]["metric"]): row["score"]["value"] for row in metrics("own")["rows"]}
    assert values == {(row.task, row.score.metric): row.score.value for row in through_its_own.rows}
    assert values["asr", "wer"] == 0.0
    assert metrics("own")["loss"] == through_its_own.loss
    assert metrics("own")["loss"]["tags"]["loss"] < metrics("natural")["loss"]["tags"]["loss"]
    note = "sample.prompt_style=natural, where the checkpoint was trained with hierarchical_tags"
    assert note in metrics("natural")["caveats"]
    assert (note in natural, note in own) == (True, False)
