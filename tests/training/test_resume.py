"""Interrupted and resumed is uninterrupted, to the bit on a CPU: losses, weights, optimiser, schedule, dropout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.data.order.state import DataStateError
from qwen2audio_train.training.checkpoints.folder import CheckpointError
from qwen2audio_train.training.stages.run import fit
from tests.runs import build_trainer, encoder_recipe, logged, pairs_recipe, recipe, train, warm_up_recipe

STEPS = ["trainer.max_steps=5", "trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.save_total_limit=9"]
SCHEDULE = [
    *("optimizer.frozen_until.language_model=4", "optimizer.frozen_from.audio_tower=2", "data.prompt_per_pass=true"),
    *("trainer.lr_scheduler_type=warmup_stable_decay", "trainer.lr_scheduler_kwargs={num_decay_steps: 2}"),
]
LORA = ["adapter.kind=lora", "adapter.r=2", "adapter.dropout=0.3"]


class Interrupt(TrainerCallback):
    """Ctrl-C in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(config: StageConfig, step: int) -> None:
    trainer = build_trainer(config)
    trainer.add_callback(Interrupt(step))
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, config)


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    (file,) = [*checkpoint.glob("model/*.safetensors"), *checkpoint.glob("adapter/*.safetensors")]
    return load_file(file)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the bit, at any depth."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), where
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_end(whole: Path, resumed: Path, last: int = 5) -> None:
    """Two runs ended in the same state."""
    a, b = whole / f"checkpoint-{last}", resumed / f"checkpoint-{last}"
    assert_same(weights_of(a), weights_of(b), "weights")
    for name in ("optimizer/rank_00000.safetensors", "scheduler.pt", "rng/rng_state.pth"):
        assert_same(torch.load(a / name, weights_only=False), torch.load(b / name, weights_only=False), name)
    states = [json.loads((folder / "data_state.json").read_text()) for folder in (a, b)]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("make", "overrides", "stop", "changes"),
    [
        (recipe, [], 3, []),
        (recipe, ["data.order=short_first", "trainer.bf16=true"], 2, ["data.num_workers=1"]),
        (recipe, ["data.num_workers=1", *LORA], 4, ["data.num_workers=0"]),
        (pairs_recipe, LORA, 3, []),
        (pairs_recipe, [], 3, []),
        (encoder_recipe, [], 3, []),
        (recipe, SCHEDULE, 3, []),
        (warm_up_recipe, ["ctc.sampled_tokens=50"], 3, []),
        (warm_up_recipe, ["stage=pretrain", "ctc.weight=0.5", "ctc.sampled_tokens=50"], 3, []),
    ],
    ids=["full", "workers", "lora", "dpo-lora", "dpo", "encoder", "schedules", "warm-up", "ctc beside"],
)
def test_resumed_is_uninterrupted(
    make: Any, overrides: list[str], stop: int, changes: list[str], noise: Path, tmp_path: Path
) -> None:
    """Stopped in the middle of a step; on going on, the number of workers may have changed."""
    whole, broken = (make(noise, tmp_path / name, *STEPS, *overrides) for name in ("whole", "broken"))
    train(whole)
    interrupted(broken, stop)
    torch.manual_seed(99)
    train(make(noise, tmp_path / "broken", *STEPS, *overrides, *changes))
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert logged(broken, *names) == logged(whole, *names)
    assert len(logged(whole, *names)) == 5
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("streaming", [False, True], ids=["indexed", "streaming"])
def test_resumed_again_and_over_the_ends_of_epochs(streaming: bool, noise: Path, tmp_path: Path) -> None:
    """Two resumes in a row, the second of a run that was resumed, and the end of a pass over the data in between."""
    kind = [f"data.sources.{name}.streaming={str(streaming).lower()}" for name in ("speech", "sound")]
    steps = [*STEPS, "trainer.max_steps=6", "trainer.save_steps=1", *kind]
    whole, broken = (recipe(noise, tmp_path / name, *steps) for name in ("whole", "broken"))
    train(whole)
    for stop in (1, 4):
        interrupted(broken, stop)
    train(broken)
    names = ("step", "loss", "grad_norm", "learning_rate")
    assert logged(broken, *names) == logged(whole, *names)
    assert_same_end(tmp_path / "whole", tmp_path / "broken", last=6)
    passes = [line for (line,) in logged(whole, "data/speech/pass")]
    assert passes[0] < passes[-1]


def test_evaluation_in_between_changes_nothing(noise: Path, tmp_path: Path) -> None:
    """Held-out passes draw no random numbers and take nothing from the training data."""
    held_out = [f"data.eval_sources.speech.path=[{noise}/speech.jsonl]", "trainer.eval_steps=1"]
    plain, evaluated = (
        recipe(noise, tmp_path / "a", *STEPS, *LORA),
        recipe(noise, tmp_path / "b", *STEPS, *LORA, *held_out),
    )
    evaluated.trainer["eval_strategy"] = "steps"
    train(plain)
    train(evaluated)
    assert logged(plain, "step", "loss", "grad_norm") == logged(evaluated, "step", "loss", "grad_norm")
    lines = [json.loads(line) for line in (tmp_path / "b" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def finished(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints 2, 4 and 5."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(recipe(noise, run_dir, *STEPS))
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_has_nothing_to_do(noise: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and path.name != "lock"}
    train(recipe(noise, copy, *STEPS))
    assert "checkpoint-5 is of the last step: nothing to do" in capsys.readouterr().out
    assert {
        path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file() and path.name != "lock"
    } == before


def test_a_finished_run_can_be_made_longer(noise: Path, copy: Path) -> None:
    longer = recipe(noise, copy, *STEPS, "trainer.max_steps=6", "trainer.lr_scheduler_type=linear")
    train(longer)
    assert [step for (step,) in logged(longer, "step")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_may_be_named(noise: Path, finished: Path, tmp_path: Path) -> None:
    """From another run's folder, under a name of its own."""
    shutil.copytree(finished / "checkpoint-2", tmp_path / "kept")
    config = recipe(noise, tmp_path / "run", *STEPS, f"resume={tmp_path}/kept")
    train(config)
    assert [step for (step,) in logged(config, "step")] == [3, 4, 5]
    assert_same_end(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("resume", "says"),
    [
        ("never", "would go on from step 0, and .*checkpoint-5 is of a later step: set resume=auto, move"),
        ("checkpoint-2", "would go on from step 2, and .*checkpoint-5 is of a later step"),
        ("/nowhere", "resume=/nowhere: no such folder; expected auto, never or a checkpoint folder"),
    ],
)
def test_later_checkpoints_are_not_mixed_up(resume: str, says: str, noise: Path, copy: Path) -> None:
    before = (copy / "config.yaml").read_text()
    chosen = f"{copy}/{resume}" if resume.startswith("checkpoint") else resume
    with pytest.raises(CheckpointError, match=says):
        train(recipe(noise, copy, *STEPS, f"resume={chosen}", "trainer.learning_rate=1"))
    assert (copy / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["data.seed=3"], ["seed: 0 when saved, 3 now"]),
        (
            ["data.packs_per_step=2", "data.tokens_per_pack=90"],
            ["packs_per_step: 4 when saved, 2", "tokens_per_pack: 100"],
        ),
        (["data.sources.sound.weight=2", "data.sources.speech.weight=1"], ["sources.sound.probability: 0.33"]),
        (["data.prompt_seed=1"], ["sources.speech.index: "]),
    ],
)
def test_changed_data_are_refused_and_named(changes: list[str], says: list[str], noise: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoint-5")
    before = (copy / "config.yaml").read_text()
    with pytest.raises(DataStateError) as info:
        train(recipe(noise, copy, *STEPS, *changes))
    for words in says:
        assert words in str(info.value)
    assert (copy / "config.yaml").read_text() == before


def test_another_model_is_refused(noise: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoint-5")
    with pytest.raises(CheckpointError, match=r"text_config\.num_hidden_layers: 2 when saved, 3 now\nPut them"):
        train(recipe(noise, copy, *STEPS, "model.architecture.text_config.num_hidden_layers=3"))


def test_another_width_is_refused(noise: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoint-5")
    with pytest.raises(CheckpointError, match=r"text_config\.intermediate_size: 48 when saved, 50 now"):
        train(recipe(noise, copy, *STEPS, "model.architecture.text_config.intermediate_size=50"))


def test_another_adapter_is_refused(noise: Path, tmp_path: Path) -> None:
    run = [*STEPS, *LORA, "trainer.max_steps=2"]
    train(recipe(noise, tmp_path, *run))
    with pytest.raises(CheckpointError, match=r"adapter\.r: 2 when saved, 3 now"):
        train(recipe(noise, tmp_path, *run, "trainer.max_steps=3", "adapter.r=3"))
    with pytest.raises(CheckpointError, match=r"adapter\.modules: .*audio_tower"):
        train(recipe(noise, tmp_path, *run, "trainer.max_steps=3", "adapter.modules=[language_model,audio_tower]"))


def test_another_optimizer_is_refused(noise: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoint-5")
    with pytest.raises(CheckpointError, match=r"model\.freeze\.lm_head: False when saved, True now"):
        train(recipe(noise, copy, *STEPS, "model.freeze.lm_head=true"))
