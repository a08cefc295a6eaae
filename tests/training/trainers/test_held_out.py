"""Held-out figures are of all held-out examples, whatever the packs of training take, and say of how many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2audio_train.training.trainers.packed import HELD_OUT_COUNTS
from tests.runs import build_trainer, encoder_recipe, grpo_recipe, pairs_recipe, recipe, warm_up_recipe


def test_held_out_loss_does_not_depend_on_the_pack_and_counts_its_examples(noise: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (noise / "speech.jsonl").read_text().splitlines()]
    lines = [line | {"audio": f"{noise}/{line['audio']}"} for line in lines]
    lines.append(lines[0] | {"id": "gone", "audio": "no/such.wav"})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"id": "no task"}\n'
    (tmp_path / "dev.jsonl").write_text(text)
    found = []
    for budget in (40, 400):
        held_out = [f"data.eval_sources.dev.path=[{tmp_path}/dev.jsonl]", "data.max_bad_share=1"]
        config = recipe(noise, tmp_path / str(budget), f"data.tokens_per_pack={budget}", *held_out)
        found.append(build_trainer(config).evaluate())
        listed = (tmp_path / str(budget) / "bad_eval_examples.rank0.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["example"].split("/")[-1] for line in listed)[-1] == "gone"
        assert len(listed) == 2
    small, large = found
    assert small["eval_loss"] == pytest.approx(large["eval_loss"], rel=1e-5)
    assert small["eval_loss/dev"] == pytest.approx(large["eval_loss/dev"], rel=1e-4)
    assert [figures["eval_examples"] for figures in found] == [24, 24]
    assert [figures["eval_quarantined"] for figures in found] == [2, 2]
    assert 0 < small["eval_too_long"] < 24
    assert large["eval_too_long"] == 0


def test_every_stage_counts_its_held_out_examples(noise: Path, tmp_path: Path) -> None:
    held_out = "data.eval_sources.dev.path=[{}/{}.jsonl]"
    pairs = pairs_recipe(noise, tmp_path / "dpo", held_out.format(noise, "pairs"))
    kto = pairs_recipe(noise, tmp_path / "kto", held_out.format(noise, "pairs"), "preference.objective=kto")
    heard = [
        make(noise, tmp_path / make.__name__, held_out.format(noise, "speech"))
        for make in (encoder_recipe, warm_up_recipe, grpo_recipe)
    ]
    for config, number in [(pairs, 12), (kto, 12), *((config, 24) for config in heard)]:
        trainer = build_trainer(config)
        figures = trainer.evaluate()
        assert figures["eval_examples"] == number
        assert figures.keys() & HELD_OUT_COUNTS == trainer.held_out_figures() & HELD_OUT_COUNTS == HELD_OUT_COUNTS
