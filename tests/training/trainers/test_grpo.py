"""Reinforcement: a group as one tree learns what separate rows learn, runs resume exactly, and the reward rises."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.samples.collate import pack
from qwen2audio_train.training.stages.grpo import check_grpo
from tests.runs import build_trainer, grpo_recipe, logged, train


def step_of(trainer: Any) -> list[dict[str, Any]]:
    batches, _ = trainer.get_batch_samples(iter(trainer.loader), 2, torch.device("cpu"))
    return batches


def gradients(trainer: Any, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    for batch in batches:
        trainer.compute_loss(trainer.model, batch).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_a_group_as_a_tree_learns_as_separate_rows(loss_type: str, noise: Path, tmp_path: Path) -> None:
    """Clip and prompt once with N branches, against N rows that each hold them again."""
    config = grpo_recipe(noise, tmp_path, f"grpo.loss_type={loss_type}", "grpo.temperature=0.8")
    trainer: Any = build_trainer(config)
    trees: list[Any] = []
    rows: list[Any] = []

    def kept(prompts: Any, completions: Any, scores: Any) -> Any:
        batch = type(trainer)._tree(trainer, prompts, completions, scores)
        trees.append((prompts, completions))
        return batch

    trainer._tree = kept
    batches = step_of(trainer)
    for batch, (prompts, completions) in zip(batches, trees, strict=True):
        alone = [
            dataclasses.replace(prompt, branches=(np.array(row, dtype=np.int64),), example=None)
            for prompt, group in zip(prompts, completions, strict=True)
            for row in group
        ]
        rows.append(dict(pack(alone, num_mel_bins=16)) | {"weight": batch["weight"], "advantage": batch["advantage"]})
    found, expected = gradients(trainer, batches), gradients(trainer, rows)
    assert float(sum(b["advantage"].abs().sum() for b in batches)) > 0
    assert found.keys() == expected.keys()
    assert rows[0]["input_ids"].numel() > batches[0]["input_ids"].numel()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_resumed_is_uninterrupted(noise: Path, tmp_path: Path) -> None:
    options = ("trainer.save_strategy=steps", "trainer.save_steps=2", "grpo.beta=0.05", "adapter.kind=lora")
    whole = grpo_recipe(noise, tmp_path / "whole", *options)
    train(whole)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    half = grpo_recipe(noise, tmp_path / "half", *options)
    train(half)
    names = ("step", "loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length")
    assert logged(half, *names) == logged(whole, *names)[2:]
    assert logged(whole, "kl")[0] == (0.0,)
    assert logged(whole, "kl")[-1][0] > 0


def test_the_reward_rises_and_is_logged(noise: Path, tmp_path: Path) -> None:
    config = grpo_recipe(noise, tmp_path, "trainer.max_steps=12", "trainer.learning_rate=3e-2")
    train(config)
    rewards = [value for (value,) in logged(config, "reward")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.5
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    for name in ("reward_std", "frac_reward_zero_std", "completions/clipped_ratio", "entropy"):
        assert name in line


def test_held_out_prompts_are_answered_greedily(noise: Path, tmp_path: Path) -> None:
    dev = f"data.eval_sources.dev.path=[{noise / 'speech.jsonl'}]"
    trainer: Any = build_trainer(grpo_recipe(noise, tmp_path, dev))
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first == again
    assert 0 < first["eval_length"] <= 5


def test_a_step_of_answers_that_do_not_end_stops_the_run(
    noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = grpo_recipe(noise, tmp_path, "grpo.max_truncated_share=0.01", "grpo.max_completion_length=1")
    train(config)
    assert "do not end within 1 tokens" in capsys.readouterr().out
    assert len(logged(config, "loss")) < 4


def test_what_cannot_be_trained_with_is_refused_first(noise: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grpo\.num_iterations"):
        check_grpo(grpo_recipe(noise, tmp_path, "grpo.num_iterations=2").grpo)
    with pytest.raises(ValueError, match=r"grpo\.rewards\.wer: expected one of .*, auto, or file\.py:function"):
        check_grpo(grpo_recipe(noise, tmp_path, "grpo.rewards={wer: 1.0}").grpo)
