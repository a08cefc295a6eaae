"""Steps that are no numbers: skipped and named; weights that are none are never saved, nor push good ones out."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2audio_train.training.checkpoints.folder import complete_checkpoints, resume_point
from qwen2audio_train.training.trainers.guard import Diverged, OutOfMemory
from qwen2audio_train.training.trainers.packed import PlansDiffer
from qwen2audio_train.training.trainers.speed import StepCounts
from tests.runs import build_trainer, encoder_recipe, logged, pairs_recipe, recipe, train

SAVED = ["trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=1"]


def spoil(trainer: Any, *steps: int) -> None:
    """Make the loss of the first micro-batch of these steps no number."""
    real, seen = trainer.compute_loss, [0]

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = real(*args, **kwargs)
        if trainer.model.training:
            step, place = divmod(seen[0], trainer.args.gradient_accumulation_steps)
            seen[0] += 1
            if step + 1 in steps and place == 0:
                return loss * float("nan")
        return loss

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize("make", [recipe, pairs_recipe, encoder_recipe])
def test_a_bad_step_is_not_taken(make: Any, noise: Path, tmp_path: Path) -> None:
    """Weights after steps 1 to 3, of which 2 is bad, are those of a run whose optimizer passes step 2 by."""
    trainer = build_trainer(
        make(noise, tmp_path, "trainer.max_steps=3", "trainer.lr_scheduler_type=constant_with_warmup")
    )
    spoil(trainer, 2)
    weights = []
    step = trainer.create_optimizer().step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        before = [p.detach().clone() for p in trainer.model.parameters()]
        result = step(*args, **kwargs)
        weights.append(all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)))
        return result

    trainer.optimizer.step = recorded
    trainer.train()
    assert weights == [True, True, False]  # the first has a rate of zero
    lines = [line for line in trainer.state.log_history if line["step"] == 2]
    assert [line.get("skipped_steps") for line in lines] == [1]
    assert "loss" not in lines[0]
    assert len(logged(make(noise, tmp_path), "loss", "grad_norm")) == 2
    (named,) = [json.loads(line) for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()]
    assert named["step"] == 2
    assert named["examples"]


def test_the_examples_are_those_of_the_step(noise: Path, tmp_path: Path) -> None:
    """Two packs of single examples a step: the named ones are the third and the fourth that the loader gives."""
    options = ["data.samples_per_pack=1", "data.packs_per_step=2", "trainer.max_steps=2"]
    trainer = build_trainer(recipe(noise, tmp_path, *options, sources=["speech"]))
    spoil(trainer, 2)
    trainer.train()
    again = build_trainer(recipe(noise, tmp_path / "again", *options, sources=["speech"])).loader
    list(islice(iter(again), 4))
    rows = [
        row for pack in list(islice(again.planner.slots(type(again._start)(), None), 4))[2:] for row in pack[0].rows
    ]
    named = json.loads((tmp_path / "skipped_steps.jsonl").read_text())["examples"]
    assert named == [f"a{position}" for _, _, position in rows]


def test_the_mean_that_is_logged_leaves_bad_steps_out(noise: Path, tmp_path: Path) -> None:
    options = ["trainer.logging_steps=3", "trainer.max_steps=3", "trainer.learning_rate=0.0", "data.packs_per_step=1"]
    config = recipe(noise, tmp_path / "all", *options, "trainer.logging_steps=1")
    train(config)
    each = [loss for (loss,) in logged(config, "loss")]
    trainer = build_trainer(recipe(noise, tmp_path / "one", *options))
    spoil(trainer, 2)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert line["loss"] == pytest.approx((each[0] + each[2]) / 2, rel=1e-5)
    assert line["skipped_steps"] == 1


@pytest.mark.parametrize("logging", ["1", "no"])
def test_diverged_weights_are_not_saved_over_good_ones(logging: str, noise: Path, tmp_path: Path) -> None:
    """Whatever is logged: a checkpoint that no finite step followed is set aside, the one before it resumed from."""
    options = [*SAVED, "trainer.max_grad_norm=0.0", "trainer.max_steps=20", "trainer.warmup_steps=3"]
    config = recipe(noise, tmp_path, *options)
    config.trainer |= {"learning_rate": 1e30}
    if logging == "no":
        config.trainer |= {"logging_strategy": "no"}
        del config.trainer["logging_steps"]
    else:
        config.trainer |= {"logging_steps": int(logging)}
    with pytest.raises(
        Diverged, match=r"its loss or gradient is no number, the 4\. step in a row; no checkpoint is made"
    ):
        train(config)
    (good,) = complete_checkpoints(tmp_path)
    assert good.name == "checkpoint-1"
    assert (tmp_path / "checkpoint-2.diverged" / "MANIFEST.json").is_file()
    assert resume_point("auto", tmp_path)[0] == good


def test_weights_beyond_numbers_are_not_saved(noise: Path, tmp_path: Path) -> None:
    trainer = build_trainer(recipe(noise, tmp_path, *SAVED))
    trainer.train()
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[0] = float("inf")
    trainer.state.global_step = 5
    with pytest.raises(Diverged, match=r"step 5: the weights are no numbers; no checkpoint is made of it\. go on from"):
        trainer.save_final_checkpoint()


def test_a_batch_that_does_not_fit_is_described(noise: Path, tmp_path: Path) -> None:
    trainer = build_trainer(recipe(noise, tmp_path))

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")

    trainer.compute_loss = compute_loss  # type: ignore[method-assign]
    batch = next(iter(build_trainer(recipe(noise, tmp_path / "same")).loader))
    tokens, clips, frames = batch["input_ids"].numel(), len(batch["clip_frames"]), int(batch["clip_frames"].sum())
    assert clips
    with pytest.raises(OutOfMemory) as info:
        trainer.train()
    words = (
        f"step 1: no memory for a batch of {tokens} tokens and {clips} clips of {frames} mel frames, the longest of "
    )
    assert str(info.value).startswith(words)
    assert "(CUDA out of memory. Tried to allocate 2.00 GiB.). Lower data.tokens_per_pack" in str(info.value)


def test_ranks_that_plan_other_examples_stop(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second rank's seed differs: what it would add to the sum over the ranks is that of its own plan."""
    trainer = build_trainer(recipe(noise, tmp_path / "a"))
    other = build_trainer(recipe(noise, tmp_path / "b", "data.seed=1")).loader
    for loader in (trainer.loader, other):
        batches = list(islice(iter(loader), loader.batches_per_step))
    plans = [float(loader.plan) for loader in (trainer.loader, other)]
    assert 0 < plans[0] != plans[1] < 2**32
    for second, differs in ((plans[0], False), (plans[1], True)):
        added = torch.tensor([0.0] * len(fields(StepCounts)) + [second], dtype=torch.float64)
        monkeypatch.setattr(trainer, "sum_over_ranks", lambda total, device=None, more=added: total + more)
        monkeypatch.setattr(type(trainer.args), "world_size", 2)
        with pytest.raises(PlansDiffer, match="step 1: rank 0 has planned other") if differs else nullcontext():
            trainer._count(batches, "cpu")


def test_none_is_skipped_where_none_may_be(noise: Path, tmp_path: Path) -> None:
    trainer = build_trainer(recipe(noise, tmp_path, "optimizer.max_skipped_steps=0"))
    spoil(trainer, 2)
    with pytest.raises(Diverged, match=r"^step 2: .*start again with a lower trainer\.learning_rate"):
        trainer.train()
