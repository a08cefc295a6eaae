"""What a log line says of speed: the share of the device's peak by its rule, and the time that is left."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2audio_train.model.flops import Load, forward_flops, training_flops
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.trainers.speed import Meter, StepCounts, load_of
from tests.runs import build_trainer, pairs_recipe, recipe

PEAK = "tracker.peak_tflops=1e-6"
"""A device of a million operations per second, so that the log's digits are enough."""


def visible_pairs(batch: dict[str, Any]) -> int:
    """Pairs of query and key, one query after the other."""
    found = 0
    for (q, k), (next_q, next_k) in zip(
        zip(batch["cu_q"].tolist(), batch["cu_k"].tolist(), strict=True),
        zip(batch["cu_q"].tolist()[1:], batch["cu_k"].tolist()[1:], strict=True),
        strict=False,
    ):
        queries, keys = next_q - q, next_k - k
        found += sum(keys - queries + place + 1 for place in range(queries))
    return found


@pytest.mark.parametrize("make", [recipe, pairs_recipe])
def test_mfu_is_useful_operations_over_what_the_device_could_do(make: Any, noise: Path, tmp_path: Path) -> None:
    lora = ["adapter.kind=lora", "adapter.r=2", "model.activation_checkpointing=[language_model]"]
    trainer = build_trainer(make(noise, tmp_path, PEAK, *lora, "trainer.max_steps=2", "trainer.logging_steps=2"))
    config: Any = unwrap(trainer.model).config
    expected = 0.0
    for batch in islice(
        build_trainer(make(noise, tmp_path / "b")).loader, 2 * trainer.args.gradient_accumulation_steps
    ):
        labels = int(batch["completion_mask"].sum()) if make is pairs_recipe else len(batch["target"])
        tokens = batch.get("packed_ids", batch["input_ids"]).numel()
        load = Load(tuple(batch["clip_frames"].tolist()), tokens, visible_pairs(batch), labels)
        # a frozen head and tower, the backward of whose inputs the tower does not need; nothing for the checkpoints
        expected += sum(training_flops(config, load, trained=(), adapted=["language_model"]).values())
        expected += sum(forward_flops(config, load).values()) * (make is pairs_recipe)  # the reference
    trainer.train()
    (line,) = [line for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "loss" in line]
    seconds = line["tokens"] / line["tokens_per_s"]
    assert line["mfu"] * 1e6 * seconds == pytest.approx(expected, rel=1e-2)
    assert line["peak_memory_gib"] > 0.1
    assert line["eta_s"] == 0


def test_without_a_peak_there_is_no_share_of_it(noise: Path, tmp_path: Path) -> None:
    trainer = build_trainer(recipe(noise, tmp_path))
    assert trainer.flops is None
    assert "mfu" not in Meter().figures(1, 0.0)


def test_pairs_of_a_tree_are_those_that_its_answers_see() -> None:
    """Prompt of two, answers of two and one: 3 + (3 + 4) + 3."""
    borders = {"cu_q": torch.tensor([0, 2, 4, 5]), "cu_k": torch.tensor([0, 2, 6, 9])}
    batch = {**borders, "clip_frames": torch.tensor([], dtype=torch.long), "input_ids": torch.zeros(1, 5)}
    assert load_of({**batch, "target": torch.zeros(3)}) == Load((), 5, 13, 3)


def test_what_is_left_goes_by_the_steps_since_the_last_line() -> None:
    meter = Meter(started=time.perf_counter() - 1000)
    for _ in range(4):
        meter.add(StepCounts(tokens=100.0, audio_s=36.0, flops=5e13))
    meter.add(StepCounts())  # the end of the data
    figures = meter.figures(steps_left=8, peak_flops=1e12)
    assert figures["eta_s"] == pytest.approx(2000, rel=0.05)
    assert figures["mfu"] == pytest.approx(0.2, rel=0.05)
    assert figures["audio_s_per_s"] == pytest.approx(0.144, rel=0.1)
