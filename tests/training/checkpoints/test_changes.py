"""A recipe that differs from the one that saved: every key is applied or refused, and said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.training.checkpoints.changes import RULES, Rule, flat, rule_of
from qwen2audio_train.training.checkpoints.folder import CheckpointError
from qwen2audio_train.training.stages.argument_table import arguments_table
from qwen2audio_train.training.stages.resume import check_resume, plain
from tests.runs import build_trainer, logged, recipe, train

STEPS = ["trainer.max_steps=4", "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.save_total_limit=9"]


@pytest.fixture(scope="module")
def finished(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 2 and 4."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(recipe(noise, run_dir, *STEPS))
    return run_dir


@pytest.fixture
def halfway(finished: Path, tmp_path: Path) -> Path:
    """The same run after two of its four steps."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    return tmp_path / "run"


def keys_of_trainer() -> list[str]:
    sections = arguments_table().values()
    return [f"trainer.{name}" for section in sections for name, entry in section.items() if "works" in entry]


def test_every_key_has_a_rule_and_every_rule_a_key(noise: Path, tmp_path: Path) -> None:
    keys = [*dict(flat(plain(recipe(noise, tmp_path)))), *keys_of_trainer()]
    assert not [key for key in keys if not any(key == s or key.startswith((f"{s}.", f"{s}_")) for s in RULES)]
    for start in RULES:
        assert any(key == start or key.startswith((f"{start}.", f"{start}_")) for key in keys), start


def altered(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return [*value, "other"] if isinstance(value, list) else "other"


def with_saved(point: Path, key: str, value: Any) -> None:
    """Let the checkpoint say that it was saved by a recipe with another value."""
    saved: dict[str, Any] = yaml.safe_load((point / "config.yaml").read_text())
    place = saved
    *path, name = key.split(".")
    for part in path:
        place = place.setdefault(part, {})
    place[name] = value
    (point / "config.yaml").write_text(yaml.safe_dump(saved))


def test_each_key_that_differs_is_refused_or_said(noise: Path, halfway: Path) -> None:
    """One after the other, every key of the recipe and every argument that works here."""
    config = recipe(noise, halfway, *STEPS)
    point = halfway / "checkpoint-2"
    text = (point / "config.yaml").read_text()
    values = dict(flat(plain(config)))
    for key in [*values, *(name for name in keys_of_trainer() if name not in values)]:
        with_saved(point, key, altered(values.get(key)))
        if rule_of(key) in (Rule.refused, Rule.content):
            with pytest.raises(CheckpointError) as info:
                check_resume(config, point, 1)
            assert f"\n  {key}: " in str(info.value)
        elif rule_of(key) not in (Rule.data, Rule.call):
            assert any(note.startswith(f"{key}: ") for note in check_resume(config, point, 1)), key
        (point / "config.yaml").write_text(text)
    assert check_resume(config, point, 1) == []


@pytest.mark.parametrize(
    "change", ["trainer.learning_rate=1", "seed=7", "data.loss_weighting=sample", "data.packs_per_step=2", "stage=sft"]
)
def test_a_finished_run_does_not_answer_for_another(change: str, noise: Path, finished: Path) -> None:
    key, _, value = change.partition("=")
    with pytest.raises(CheckpointError, match=rf"of a run with other settings:\n  {key}: .* when saved, .*{value}"):
        train(recipe(noise, finished, *STEPS, change))


CHANGED = [
    "trainer.learning_rate=2e-3",
    "trainer.lr_scheduler_type=linear",
    "trainer.weight_decay=0.5",
    "trainer.adam_beta1=0.7",
    "trainer.adam_beta2=0.5",
    "trainer.adam_epsilon=1e-5",
    "trainer.max_grad_norm=0.5",
    "trainer.save_steps=1",
    "trainer.logging_steps=2",
    "optimizer.learning_rates.lm_head=1e-4",
    "optimizer.encoder_layer_decay=0.5",
]


def test_what_a_resumed_run_is_asked_to_change_is_used(
    noise: Path, halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Groups as in a fresh run of the changed recipe, at the rates that its schedule has after two steps."""
    groups = ["optimizer.learning_rates.lm_head=1e-2"]  # the saved run had one rate for all
    config = recipe(noise, halfway, *STEPS, *groups, *CHANGED)
    resumed = train(config)
    fresh = train(recipe(noise, tmp_path / "fresh", *STEPS, *groups, *CHANGED))
    for ours, theirs in zip(resumed.optimizer.param_groups, fresh.optimizer.param_groups, strict=True):
        assert {k: v for k, v in ours.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}
    assert logged(config, "step")[-1] == (4,)
    assert (halfway / "checkpoint-3").is_dir()
    said = capsys.readouterr().out
    assert "resume: trainer.learning_rate: 0.01 when saved, 0.002 now (from here on)" in said


def test_the_first_step_has_the_new_rate(noise: Path, halfway: Path) -> None:
    """The weights move by it: with a rate of zero they stay where they were."""
    trainer = train(recipe(noise, halfway, *STEPS, "trainer.learning_rate=0", "trainer.max_steps=3"))
    before = build_trainer(recipe(noise, halfway.parent / "b", f"init_from={halfway}/checkpoint-2")).model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_another_optimizer_is_not_given_the_state(noise: Path, halfway: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trainer\.optim: 'adamw_torch_fused' when saved, 'sgd' now|unset when"):
        train(recipe(noise, halfway, *STEPS, "trainer.optim=sgd"))


def test_a_state_that_cannot_be_shared_out_anew_is_refused(noise: Path, halfway: Path) -> None:
    config: StageConfig = recipe(noise, halfway, *STEPS, "trainer.optim=adafactor", "deepspeed.stage=2")
    point = halfway / "checkpoint-2"
    with_saved(point, "trainer.optim", "adafactor")
    lineage = json.loads((point / "lineage.json").read_text())
    (point / "lineage.json").write_text(json.dumps(lineage | {"zero_stage": 2, "world_size": 2}))
    with pytest.raises(CheckpointError, match=r"its state was saved under ZeRO-2 on 2 ranks and cannot be shared out"):
        check_resume(config, point, 1)
