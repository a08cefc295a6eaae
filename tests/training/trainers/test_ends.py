"""When a run ends, what it leaves behind, and that it stays ended when it is started again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen2audio_train.config.schema import ConfigError, StageConfig
from tests.runs import encoder_recipe, grpo_recipe, pairs_recipe, recipe, train

SAVED = ["trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.max_steps=50"]


def held_out(noise: Path, source: str, *others: str) -> list[str]:
    path = f"data.eval_sources.{source}.path=[{noise}/{source}.jsonl]"
    return [path, "trainer.eval_strategy=steps", "trainer.eval_steps=1", *others]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("make", "source", "passes"),
    [(recipe, "speech", 2), (pairs_recipe, "pairs", 3), (encoder_recipe, "speech", 1), (grpo_recipe, "speech", 1)],
)
def test_data_that_end_end_the_run(
    make: Any, source: str, passes: int, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checkpoint, a last evaluation and a line; started again there is nothing to do; more epochs go on."""

    def config(epochs: int) -> StageConfig:
        capped = [f"data.sources.{source}.epochs={epochs}", *held_out(noise, source, "trainer.eval_steps=100")]
        return make(noise, tmp_path, *SAVED, *capped, *(["data.sources.sound.epochs=1"] if make is recipe else []))

    trainer = train(config(passes))
    last = trainer.state.global_step
    output = capsys.readouterr().out
    assert f"the data end after step {last} (data.sources.*.epochs), trainer.max_steps is 50" in output
    assert f"the data have ended after step {last} of 50: the run is finished" in output
    assert 1 <= last < 50
    assert trainer.loader.last_step(50) == last
    assert f"checkpoint-{last}" in checkpoints(tmp_path)
    assert trainer.state.log_history[-2]["step"] == last
    figure = "eval_reward" if make is grpo_recipe else "eval_loss"
    assert any(figure in line and line["step"] == last for line in trainer.state.log_history)
    before = (tmp_path / "log.jsonl").read_text()
    train(config(passes))
    assert f"checkpoint-{last} is of the last step that the data have" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_text() == before


def test_every_example_was_seen_as_often_as_it_may_be(noise: Path, tmp_path: Path) -> None:
    config = recipe(noise, tmp_path, "data.sources.speech.epochs=3", "trainer.max_steps=99", sources=["speech"])
    trainer = train(config)
    seen = json.loads((tmp_path / f"checkpoint-{trainer.state.global_step}" / "data_state.json").read_text())["seen"]
    assert 3 * 24 in [
        value for figures in seen.values() if isinstance(figures, dict) for value in figures.values()
    ] or (str(3 * 24) in json.dumps(seen))


def test_the_best_checkpoint_is_kept_beside_the_newest(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate that wrecks the model after the second step: the best is of an early step, and stays."""
    best = ["trainer.save_strategy=best", "trainer.save_total_limit=1", "trainer.metric_for_best_model=eval_loss"]
    rate = ["trainer.learning_rate=0.3", "trainer.max_steps=6", "trainer.lr_scheduler_type=constant_with_warmup"]
    trainer = train(recipe(noise, tmp_path, *held_out(noise, "speech"), *best, *rate))
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    step = min(losses, key=lambda number: losses[number])
    assert step < 6
    assert checkpoints(tmp_path) == sorted([f"checkpoint-{step}", "checkpoint-6"])
    assert f"the best eval_loss was {losses[step]:.4g}, at step {step}" in capsys.readouterr().out


def test_a_run_that_stopped_early_stays_stopped(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until it has more patience; it says its best and its last figure."""
    guard = ["preference.watch=eval_loss", "preference.watch_lower=true", "trainer.learning_rate=0.0"]
    config = pairs_recipe(noise, tmp_path, *held_out(noise, "pairs"), *guard, "preference.patience=1")
    assert train(config).state.global_step == 2
    capsys.readouterr()
    assert train(config).state.global_step == 0
    says = (
        "checkpoint-2 is where the run stopped, as eval_loss has not improved for 1 evaluations (best 0.6931 at step 1"
    )
    assert says in capsys.readouterr().out
    config.preference.patience = 3
    assert train(config).state.global_step == 4


WRONG = [
    (["preference.watch=eval_reward/accuracies", "preference.patience=1"], r"did you mean eval_rewards/accuracies\?"),
    (
        ["preference.objective=kto", "preference.patience=1"],
        r"preference\.watch=eval_rewards/accuracies: no held-out figure of this run",
    ),
    (
        ["trainer.save_strategy=best", "trainer.metric_for_best_model=eval_wer"],
        r"trainer\.metric_for_best_model=eval_wer: no held-out figure of this run; ",
    ),
    (["preference.patience=2", 'trainer.eval_strategy="no"'], r"preference\.patience=2: counts evaluations"),
    (["preference.watch=eval_loss"], r"preference\.watch=eval_loss: does nothing without preference\.patience"),
]


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_watched_is_checked_before_the_first_step(
    overrides: list[str], says: str, noise: Path, tmp_path: Path
) -> None:
    given = held_out(noise, "pairs")
    if any("eval_strategy" in override for override in overrides):
        given = given[:1]
    with pytest.raises(ConfigError, match=says):
        train(pairs_recipe(noise, tmp_path, *given, *overrides))
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_figures_that_may_be_watched_are_those_logged(objective: str, noise: Path, tmp_path: Path) -> None:
    from fnmatch import fnmatchcase

    from tests.runs import build_trainer

    options = [f"preference.objective={objective}", "preference.probe_examples=2"]
    trainer = build_trainer(pairs_recipe(noise, tmp_path, *held_out(noise, "pairs"), *options))
    found = set(trainer.evaluate()) - {"epoch"}
    known = trainer.held_out_figures()
    assert all(any(fnmatchcase(name, pattern) for pattern in known) for name in found)
    assert {name for name in known if "*" not in name} <= found | {"eval_drift/kl"}
