"""Parts that begin to learn later, or stop earlier; resumes are in test_resume.py, ZeRO in test_training_ranks.py."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen2audio_train.config.schema import ConfigError
from tests.runs import recipe, train


def test_parts_that_wait_or_stop_keep_their_weights(noise: Path, tmp_path: Path) -> None:
    """Four steps: the language model learns from step 2 on, the projector up to step 1; the others all the time."""
    schedule = ["optimizer.frozen_until.language_model=2", "optimizer.frozen_from.multi_modal_projector=1"]
    config = recipe(
        noise, tmp_path, *schedule, "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=9"
    )
    train(config)
    saved = [load_file(tmp_path / f"checkpoint-{step}" / "model" / "model.safetensors") for step in (1, 2, 3, 4)]

    def changed(part: str) -> list[bool]:
        return [
            any(not torch.equal(before[name], after[name]) for name in before if part in name)
            for before, after in pairwise(saved)
        ]

    assert changed("language_model.model.layers") == [False, True, True]
    assert changed("multi_modal_projector") == [False, False, False]
    assert changed("audio_tower.layers") == changed("lm_head") == [True, True, True]


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        (["optimizer.frozen_until.lm_head=2", "model.freeze.lm_head=true"], r"frozen_until: lm_head has no trainable"),
        (["optimizer.frozen_until.lm_head=2", "optimizer.frozen_from.lm_head=2"], r"frozen_from.lm_head=2: not after"),
    ],
)
def test_a_freeze_schedule_without_effect_is_refused(
    schedule: list[str], complaint: str, noise: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(recipe(noise, tmp_path, *schedule))
