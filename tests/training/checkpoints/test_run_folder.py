"""A run folder that stops taking what a run writes into it beside its checkpoints."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from qwen2audio_train.training.checkpoints.folder import CheckpointError, verify
from qwen2audio_train.training.checkpoints.writing import disk_failures_in_words
from qwen2audio_train.training.stages.run import fit
from tests.runs import build_trainer, recipe, train

SAVING = ["trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.max_steps=2"]


class BeforeStep(TrainerCallback):
    """Does something before the second step."""

    def __init__(self, do: Any) -> None:
        self.do = do

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            self.do()


def disturbed(noise: Path, run_dir: Path, do: Any) -> str:
    """What the end of a run says to which something was done before its second step."""
    config = recipe(noise, run_dir, *SAVING)
    trainer = build_trainer(config)
    trainer.add_callback(BeforeStep(do))
    with pytest.raises(CheckpointError) as info:
        fit(trainer, config)
    return str(info.value)


def test_a_log_on_a_full_disk_ends_the_run_in_words(noise: Path, tmp_path: Path) -> None:
    """Every write to /dev/full says that there is no space; the run goes on from its checkpoint once there is."""
    log = tmp_path / "log.jsonl"

    def fill() -> None:
        log.rename(tmp_path / "kept")
        log.symlink_to("/dev/full")

    words = disturbed(noise, tmp_path, fill)
    assert words.startswith(f"run_dir={tmp_path}: cannot go on ([Errno 28] No space left on device; ")
    assert words.endswith(f"{tmp_path}/checkpoint-1 is complete and will be resumed from")
    (tmp_path / "kept").rename(log)
    train(recipe(noise, tmp_path, *SAVING))
    verify(tmp_path / "checkpoint-2")


def test_a_recipe_that_cannot_be_written_is_said_before_the_first_step(noise: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"No space left on device; .* free\)\. there is no earlier checkpoint$"):
        train(recipe(noise, tmp_path, *SAVING))


def test_a_run_folder_that_is_deleted_meanwhile_is_named(noise: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = disturbed(noise, run_dir, lambda: shutil.rmtree(run_dir))
    assert re.match(rf"run_dir={run_dir}: was deleted or moved away during the run \(", words)


def test_other_errors_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_failures_in_words(tmp_path):
        raise PermissionError(13, "Permission denied")


def test_every_second_checkpoint_stays_for_good(noise: Path, tmp_path: Path) -> None:
    saves = ("trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=1")
    train(recipe(noise, tmp_path / "run", *saves, "keep_every_steps=2"))
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4"]
