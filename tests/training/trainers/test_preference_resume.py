"""A DPO run that was stopped and goes on equals one that was not, to the bit, with every kind of reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2audio_train.data.examples import PreferenceExample
from qwen2audio_train.training.stages.run import fit
from tests.training.stages.test_probes import pairs, recipe, trainer_from

__all__ = ["pairs"]  # a fixture

ADAPTER = {"adapter__kind": "lora", "adapter__r": 2}
KINDS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "cached": {"preference__reference": "cached"},
    "adapter": ADAPTER,
    "adapter that fills the store": {**ADAPTER, "preference__reference": "cached"},
}


def run(folder: Path, pairs: list[PreferenceExample], steps: int, **options: Any) -> Any:
    changes = {"trainer__lr_scheduler_type": "constant", "trainer__save_strategy": "steps", "trainer__save_steps": 2}
    config = recipe(folder, pairs, trainer__max_steps=steps, trainer__optim="adamw_torch", **changes, **options)
    trainer = trainer_from(config)
    fit(trainer, config)
    return trainer


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(kind: str, pairs: list[PreferenceExample], tmp_path: Path) -> None:
    whole_folder, cut_folder = tmp_path / "whole", tmp_path / "cut"
    whole_folder.mkdir()
    cut_folder.mkdir()
    whole = run(whole_folder, pairs, 4, **KINDS[kind])
    run(cut_folder, pairs, 2, **KINDS[kind])
    resumed = run(cut_folder, pairs, 4, **KINDS[kind])
    names = ("loss", "grad_norm", "rewards/margins", "eval_loss")
    expected, found = (
        [[line[name] for name in names if name in line] for line in trainer.state.log_history if "step" in line][:8]
        for trainer in (whole, resumed)
    )
    assert found == expected
    weights = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
