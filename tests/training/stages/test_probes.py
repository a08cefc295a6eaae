"""Probes and guard of preference training, and the stage's trainer from a recipe with a live and a stored reference."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from transformers import TrainerControl, TrainerState

from qwen2audio_train.config.schema import AdapterConfig, AdapterKind, ConfigError, StageConfig, load_config
from qwen2audio_train.data.examples import ChatExample, Clip, Example, Message, PreferenceExample, UnpairedExample
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.evaluation.decoding.lazy_samples import LazySamples
from qwen2audio_train.evaluation.scoring.likelihood import score_labels
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.training.stages import probes as guards
from qwen2audio_train.training.stages.arguments import training_arguments
from qwen2audio_train.training.stages.batches import training_batches
from qwen2audio_train.training.stages.policy import build_policy
from qwen2audio_train.training.stages.preference import every_training_pair, preference_trainer
from qwen2audio_train.training.stages.probes import HeldOutGuard, decoded_probe, drift_probe, listening_probe
from qwen2audio_train.training.stages.run import open_run
from qwen2audio_train.training.stages.tokenizer import build_tokenizer
from tests.evaluation.tiny import ARCHITECTURE, MEL_BINS, SAMPLES, noise, tiny_model, tiny_tokenizer
from tests.training.pairs import batches_of, config, our_trainer, random_pair

DECODING = Decoding(max_new_tokens=4)


@pytest.fixture
def pairs(tmp_path: Path) -> list[PreferenceExample]:
    examples = []
    for number in range(4):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, noise(np.random.default_rng(number), 0.3 + 0.1 * number), 16_000)
        prompt = (Message("user", (Clip(str(path), 0.3 + 0.1 * number), "What is said?")),)
        meta = {"task": "asr", "language": "en"}
        examples.append(PreferenceExample(f"p{number}", prompt, f"the cat {number}", (f"a mat {number}",), "s", meta))
    return examples


def trainer_of(model: Any, folder: Path, probes: list[Any]) -> Any:
    batches = batches_of([random_pair(np.random.default_rng(0), (20,))], 1)
    return our_trainer(model, batches, config(folder), eval_batches=batches, probes=probes)[0]


def lora() -> Any:
    return apply_adapter(tiny_model(spread=1.0), AdapterConfig(kind=AdapterKind.lora, r=2, modules=["language_model"]))


def change(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))


def test_a_policy_that_is_its_reference_has_no_margin_and_no_kl(
    pairs: list[PreferenceExample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model's answers do not end: what is drawn is given here, the second answer being one that was cut off.
    monkeypatch.setattr(guards, "sample_texts", lambda *_: [["a", "the cat sat on the mat"] for _ in pairs])
    tokenizer = tiny_tokenizer()
    probes = [listening_probe(tokenizer, pairs, SAMPLES), drift_probe(tokenizer, pairs, SAMPLES, DECODING)]
    trainer = trainer_of(lora(), tmp_path, probes)
    found = trainer.evaluate()
    for audio in ("own", "swapped", "silence"):
        assert found[f"eval_listening/margin_{audio}"] == pytest.approx(0.0, abs=1e-4)
    assert found["eval_drift/kl"] == pytest.approx(0.0, abs=1e-4)
    assert found["eval_drift/characters"] == 11.5
    change(trainer.model)
    moved = trainer.evaluate()
    margins = [moved[f"eval_listening/margin_{audio}"] for audio in ("own", "swapped", "silence")]
    assert len(set(margins)) == 3
    answers = [replace(pair, chosen="a", rejected=()) for pair in pairs]
    samples = LazySamples(answers, tokenizer, SAMPLES, for_generation=False)
    own = [score.logps[0] for score in score_labels(trainer.model, samples) if score]
    with trainer.model.disable_adapter():
        base = [score.logps[0] for score in score_labels(trainer.model, samples) if score]
    assert moved["eval_drift/kl"] == pytest.approx(np.mean(own) - np.mean(base), abs=1e-4)
    assert abs(moved["eval_drift/kl"]) > 0.01
    assert trainer.model.active_adapter == "default"


def test_without_a_reference_margins_are_of_log_probabilities(pairs: list[PreferenceExample]) -> None:
    model = tiny_model(spread=1.0)
    probe = listening_probe(tiny_tokenizer(), pairs, SAMPLES)

    class NoReference:
        beta = 0.1

        def __init__(self) -> None:
            self.model = model

        def reference_model(self) -> Any:
            return nullcontext(None)

    margin = probe(NoReference())["listening/margin_own"]  # type: ignore[arg-type]
    assert margin != 0.0


def test_decoded_probe_gives_the_tasks_own_metric(pairs: list[PreferenceExample], tmp_path: Path) -> None:
    asked = [ChatExample(p.id, (*p.prompt, Message("assistant", (p.chosen,))), "s", meta=p.meta) for p in pairs]
    trainer = trainer_of(lora(), tmp_path, [decoded_probe(tiny_tokenizer(), asked, SAMPLES, DECODING)])
    found = trainer.evaluate()
    assert 0.5 < found["eval_decoded/wer/s"] <= 4.0


# Guard ----------------------------------------------------------------------------------------------------------------


def stops(values: list[float], patience: int, **options: Any) -> bool:
    state = TrainerState(log_history=[{"eval_x": value} for value in values])  # type: ignore[misc]
    control = TrainerControl()
    guard = HeldOutGuard("eval_x", patience, **options)
    guard.on_evaluate(SimpleNamespace(), state, control, metrics={"eval_x": values[-1]})  # type: ignore[arg-type]
    return control.should_training_stop


def test_guard_stops_when_nothing_gets_better() -> None:
    assert not stops([0.5], 1)
    assert not stops([0.5, 0.6], 1)
    assert stops([0.5, 0.5], 1)
    assert not stops([0.7, 0.6, 0.5], 3)
    assert stops([0.7, 0.6, 0.5, 0.7], 3)
    assert not stops([0.7, 0.6, 0.5, 0.71], 3)
    assert stops([0.2, 0.3], 1, greater_is_better=False)
    assert not stops([0.3, 0.2], 1, greater_is_better=False)


def test_guard_names_a_figure_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="eval_y: not among eval_x"):
        HeldOutGuard("eval_y", 1).on_evaluate(
            SimpleNamespace(),
            TrainerState(),
            TrainerControl(),
            metrics={"eval_x": 1.0},  # type: ignore[arg-type]
        )


# The stage ------------------------------------------------------------------------------------------------------------


def recipe(folder: Path, pairs: Sequence[Example], **changes: Any) -> StageConfig:
    manifest = folder / "pairs.jsonl"
    manifest.write_text("".join(json.dumps(to_record(pair, folder)) + "\n" for pair in pairs))
    source = {"path": [str(manifest)]}
    values: dict[str, Any] = {
        "stage": "dpo",
        "name": "test",
        "run_dir": str(folder / "run"),
        "model": {"kind": "tiny", "num_mel_bins": MEL_BINS, "vocab_size": 300, "architecture": ARCHITECTURE},
        "data": {
            "sources": {"train": source},
            "eval_sources": {"held_out": source},
            "samples_per_pack": 2,
            "packs_per_step": 2,
            "num_workers": 0,
            "cache_dir": str(folder / "index"),
        },
        "trainer": {"max_steps": 3, "learning_rate": 0.01, "optim": "sgd", "bf16": False, "eval_strategy": "steps"}
        | {"eval_steps": 1, "logging_steps": 1, "save_strategy": "no", "use_cpu": True},
        "preference": {"cache_dir": str(folder / "reference")},
        "tracker": {"wandb": "off"},
    }
    for path, value in changes.items():
        *parents, key = path.split("__")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = value
    return load_config(values, StageConfig)


def trainer_from(config: StageConfig) -> Any:
    open_run(config)
    tokenizer = build_tokenizer(config)
    model = build_policy(config, tokenizer)
    return preference_trainer(config, training_arguments(config), model, tokenizer, training_batches(config, tokenizer))


def test_stored_reference_from_a_recipe_trains_as_the_frozen_one(
    pairs: list[PreferenceExample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = trainer_from(recipe(tmp_path, pairs))
    frozen.train()
    cached = trainer_from(recipe(tmp_path, pairs, preference__reference="cached", preference__probe_examples=2))
    assert "0 pairs were stored, now 4" in capsys.readouterr().out
    assert cached.ref_model is None
    cached.train()
    for name in ("loss", "eval_loss", "eval_rewards/margins"):
        found, expected = ([line[name] for line in t.state.log_history if name in line] for t in (cached, frozen))
        assert len(found) == 3
        assert found == pytest.approx(expected, abs=1e-5)
    assert any("eval_listening/margin_silence" in line for line in cached.state.log_history)
    again = trainer_from(recipe(tmp_path, pairs, preference__reference="cached"))
    assert "4 pairs were stored, now 4" in capsys.readouterr().out
    again.train()


def test_guard_from_a_recipe_ends_the_run(pairs: list[PreferenceExample], tmp_path: Path) -> None:
    options = {"preference__patience": 1, "preference__watch": "eval_loss", "preference__watch_lower": True}
    trainer = trainer_from(recipe(tmp_path, pairs, trainer__learning_rate=0.0, **options))
    trainer.train()
    assert trainer.state.global_step == 2


def test_augmented_audio_and_a_stored_reference_are_refused(pairs: list[PreferenceExample], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.augment\.gain"):
        trainer_from(recipe(tmp_path, pairs, preference__reference="cached", data__augment__gain=0.5))


def test_kto_from_a_recipe(pairs: list[PreferenceExample], tmp_path: Path) -> None:
    options = {"preference__objective": "kto", "data__samples_per_pack": 4, "data__packs_per_step": 1}
    trainer = trainer_from(recipe(tmp_path, pairs, **options))
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match="objective=kto"):
        trainer_from(recipe(tmp_path, pairs, preference__reference="cached", **options))


def test_answers_without_their_opposite_are_for_kto(pairs: list[PreferenceExample], tmp_path: Path) -> None:
    answers = [UnpairedExample(p.id, p.prompt, p.chosen, bool(i % 2), "s") for i, p in enumerate(pairs)]
    options = {"data__samples_per_pack": 4, "data__packs_per_step": 1, "preference__probe_examples": 2}
    trainer = trainer_from(recipe(tmp_path, answers, preference__objective="kto", **options))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    assert {"eval_rewards/margins", "eval_drift/characters"} <= lines[0].keys()
    with pytest.raises(ConfigError, match=r"use preference\.objective=kto"):
        trainer_from(recipe(tmp_path, answers, **options)).train()
    with pytest.raises(ConfigError, match=r"data\.samples_per_pack=1"):
        trainer_from(recipe(tmp_path, answers, preference__objective="kto", data__samples_per_pack=1))


def test_a_stream_cannot_be_read_ahead(pairs: list[PreferenceExample], tmp_path: Path) -> None:
    config = recipe(tmp_path, pairs, preference__reference="cached")
    config.data.sources["train"].streaming = True
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"data\.sources\.train\.streaming"):
        every_training_pair(config, tiny_tokenizer(), model)
    assert every_training_pair(config, tiny_tokenizer(), lora()) is None
