"""Packed trees under our trainer against padded, unshared rows under TRL's own: loss, metrics, gradients, steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2AudioForConditionalGeneration

from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import tiny_config
from tests.training.pairs import batches_of, config, our_trainer, random_pair, stock_trainer

TOLERANCE = 1e-4
SAME = (
    "loss",
    "entropy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
)
SAME += ("logps/rejected", "logits/chosen", "logits/rejected", "mean_token_accuracy")


def packed(seed: int) -> PackedQwen2Audio:
    torch.manual_seed(seed)
    return PackedQwen2Audio(tiny_config())


def stock(seed: int) -> Qwen2AudioForConditionalGeneration:
    tiny = tiny_config()
    tiny._attn_implementation = "sdpa"
    model = Qwen2AudioForConditionalGeneration(tiny)
    model.load_state_dict(packed(seed).state_dict())
    return model


def prompts(kind: str) -> list[Sample]:
    rng = np.random.default_rng(3)
    if kind == "one clip":
        return [random_pair(rng, (frames,)) for frames in (40, 61, 7, 3000)]
    if kind == "several clips":
        return [random_pair(rng, (30, 41)), random_pair(rng, (12, 90, 17)), random_pair(rng, (25,))]
    if kind == "several turns":
        return [
            random_pair(rng, (30, 41), turns=2),
            random_pair(rng, (50,), turns=3),
            random_pair(rng, (9, 9), turns=1),
        ]
    if kind == "voice chat":
        return [random_pair(rng, (frames,), text=False) for frames in (40, 77)]
    return [random_pair(rng, (44,), num_rejected=3), random_pair(rng, (60,), num_rejected=1)]


KINDS = ["one clip", "several clips", "several turns", "voice chat", "several rejected answers"]


def run(trainer: Any) -> dict[str, float]:
    """Train, and return the first log line."""
    trainer.train()
    line: dict[str, float] = trainer.state.log_history[0]
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_loss_metrics_and_gradients_equal_trl(kind: str, tmp_path: Path) -> None:
    samples = prompts(kind)
    num_pairs = sum(len(sample.branches) - 1 for sample in samples)
    theirs, their_gradients = stock_trainer(
        stock(0), samples, config(tmp_path, per_device_train_batch_size=num_pairs), ref_model=stock(1)
    )
    ours, our_gradients = our_trainer(
        packed(0), batches_of(samples, len(samples)), config(tmp_path), ref_model=packed(1)
    )
    expected, found = run(theirs), run(ours)
    for name in SAME:
        assert found[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=TOLERANCE), name
    assert abs(found["loss"] - math.log(2)) > 1e-3
    assert our_gradients.by_name.keys() == their_gradients.by_name.keys()
    floor = 1e-4 * max(float(gradient.norm()) for gradient in their_gradients.by_name.values())
    for name, gradient in their_gradients.by_name.items():
        gap = float((our_gradients.by_name[name] - gradient).norm()) / max(float(gradient.norm()), floor)
        assert gap < TOLERANCE, f"{name}: {gap:.2e}"


def test_three_steps_end_at_the_same_weights(tmp_path: Path) -> None:
    samples = prompts("one clip")[:3]
    theirs, _ = stock_trainer(
        stock(0), samples, config(tmp_path, per_device_train_batch_size=3, max_steps=3), ref_model=stock(1)
    )
    ours, _ = our_trainer(packed(0), batches_of(samples, 3), config(tmp_path, max_steps=3), ref_model=packed(1))
    theirs.train()
    ours.train()
    start = packed(0).state_dict()
    for (name, expected), found in zip(
        theirs.model.state_dict().items(), ours.model.state_dict().values(), strict=True
    ):
        assert torch.allclose(found, expected, rtol=TOLERANCE, atol=1e-5), name
    assert any(not torch.equal(tensor, start[name]) for name, tensor in ours.model.state_dict().items())


def test_first_loss_is_ln_2(tmp_path: Path) -> None:
    samples = [random_pair(np.random.default_rng(0), (40,)) for _ in range(4)]
    trainer, _ = our_trainer(
        packed(0), batches_of(samples, 2), config(tmp_path, gradient_accumulation_steps=2), ref_model=packed(0)
    )
    assert run(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-5)
