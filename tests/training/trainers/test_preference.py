"""The DPO trainer by itself: what a step's loss is a mean of, where the reference comes from, which losses run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen2audio_train.config.preference import Reference
from qwen2audio_train.config.schema import AdapterConfig, AdapterKind
from qwen2audio_train.data.samples.collate import pack_preference
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from qwen2audio_train.training.reference.cache import ReferenceCache, ReferenceCacheError
from qwen2audio_train.training.reference.reference import reference_digest
from tests.model.rows import BANDS, tiny_config
from tests.parity.steps import RELATIVE_TOLERANCE, worst
from tests.training.pairs import batches_of, config, our_trainer, random_pair

SAMPLES = [random_pair(np.random.default_rng(seed), (20 + 7 * seed,), name=f"p{seed}") for seed in range(4)]


def policy(seed: int = 0) -> PackedQwen2Audio:
    torch.manual_seed(seed)
    return PackedQwen2Audio(tiny_config())


def lora(seed: int = 0, trained: bool = False) -> Any:
    """A policy with an adapter; a trained one already changes something."""
    model = apply_adapter(policy(seed), AdapterConfig(kind=AdapterKind.lora, r=2, modules=["language_model"]))
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.05)
    return model


def first_log(trainer: Any) -> dict[str, float]:
    trainer.train()
    line: dict[str, float] = trainer.state.log_history[0]
    return line


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    name, gap = worst(found, expected)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo", "hinge"]])
def test_accumulation_is_a_mean_over_all_pairs_of_the_step(loss_type: list[str], tmp_path: Path) -> None:
    """One micro-batch of four, two of two, four of one; also three and one, and a filler between them."""
    splits = {"4": [4], "2+2": [2, 2], "1+1+1+1": [1, 1, 1, 1], "3+1": [3, 1], "2+filler+2": [2, 0, 2]}
    lines, gradients = {}, {}
    for name, sizes in splits.items():
        borders = np.cumsum([0, *sizes])
        batches = [pack_preference(SAMPLES[a:b], BANDS) for a, b in itertools.pairwise(borders)]
        args = config(tmp_path, gradient_accumulation_steps=len(batches), loss_type=loss_type)
        trainer, kept = our_trainer(policy(0), batches, args, ref_model=policy(1))
        lines[name], gradients[name] = first_log(trainer), kept.by_name
    for name, line in lines.items():
        for metric, value in line.items():
            if metric.partition("/")[0] in {"loss", "grad_norm", "rewards", "logps", "logits", "entropy", "lengths"}:
                assert value == pytest.approx(lines["4"][metric], rel=1e-5, abs=1e-6), (name, metric)
        assert_close(gradients[name], gradients["4"])


def test_filler_step_changes_nothing(tmp_path: Path) -> None:
    trainer, _ = our_trainer(policy(0), [pack_preference([], BANDS)], config(tmp_path), ref_model=policy(1))
    batch = trainer._prepare_inputs(pack_preference([], BANDS))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(3.0))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
    assert trainer._means("train") == {}


LOSSES: list[dict[str, Any]] = [
    {"loss_type": [name]}
    for name in (
        "hinge",
        "ipo",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
        "sigmoid_norm",
    )
]
LOSSES += [
    {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    {"loss_type": ["robust"], "label_smoothing": 0.1},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    {"ld_alpha": 0.5},
    {"use_weighting": True},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_every_loss_of_trl_trains(options: dict[str, Any], tmp_path: Path) -> None:
    trainer, kept = our_trainer(policy(0), batches_of(SAMPLES, 4), config(tmp_path, **options), ref_model=policy(1))
    assert math.isfinite(first_log(trainer)["loss"])
    assert all(torch.isfinite(gradient).all() for gradient in kept.by_name.values())
    assert sum(float(gradient.norm()) for gradient in kept.by_name.values()) > 0


def test_disabled_adapter_is_the_reference_of_a_fresh_one(tmp_path: Path) -> None:
    trainer, kept = our_trainer(lora(), batches_of(SAMPLES, 4), config(tmp_path, max_steps=2))
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    first, second = (line["loss"] for line in trainer.state.log_history[:2])
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert second < first - 1e-4
    assert all(".lora_" in name for name in kept.by_name)


def test_a_copy_of_the_adapter_is_the_reference_of_a_trained_one(tmp_path: Path) -> None:
    trainer, kept = our_trainer(lora(trained=True), batches_of(SAMPLES, 4), config(tmp_path))
    assert first_log(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(".default." in name for name in kept.by_name)


def test_adapter_and_frozen_copy_give_the_same_step(tmp_path: Path) -> None:
    options = {"args": config(tmp_path, max_steps=2, learning_rate=1.0), "batches": batches_of(SAMPLES, 4)}
    off, off_gradients = our_trainer(lora(), **options)
    frozen, frozen_gradients = our_trainer(lora(), ref_model=policy(), **options)
    off.train()
    frozen.train()
    for a, b in zip(off.state.log_history[:2], frozen.state.log_history[:2], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert_close(frozen_gradients.by_name, off_gradients.by_name)


def test_impossible_references_are_refused(tmp_path: Path) -> None:
    batches = batches_of(SAMPLES, 4)
    with pytest.raises(ValueError, match="ref_model is missing"):
        our_trainer(policy(), batches, config(tmp_path))
    with pytest.raises(ValueError, match="policy has no adapter"):
        our_trainer(policy(), batches, config(tmp_path), reference=Reference.adapter)
    with pytest.raises(ValueError, match="no cache is given"):
        our_trainer(policy(), batches, config(tmp_path), reference=Reference.cached)
    half = lora()
    half.get_base_model().model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(ValueError, match=r"2 tensors outside the adapter .*multi_modal_projector"):
        our_trainer(half, batches, config(tmp_path))


def test_what_is_trained_beside_the_adapter_stays_trained(tmp_path: Path) -> None:
    half = lora(trained=True)
    half.get_base_model().model.multi_modal_projector.requires_grad_(True)
    trainer, kept = our_trainer(half, batches_of(SAMPLES, 4), config(tmp_path), ref_model=policy())
    trainer.train()
    assert any("multi_modal_projector" in name for name in kept.by_name)


# Stored reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_cached_and_live_reference_give_the_same_run(ld_alpha: float | None, tmp_path: Path) -> None:
    """Full fine-tuning: the cache is filled by the policy before its first step, and no reference is kept."""
    args = config(tmp_path, max_steps=4, ld_alpha=ld_alpha)
    batches = batches_of(SAMPLES, 2)
    live, live_gradients = our_trainer(policy(0), batches, args, ref_model=policy(0))
    cache = ReferenceCache(tmp_path / "cache", "x")
    cached, cached_gradients = our_trainer(policy(0), batches, args, reference=Reference.cached, cache=cache)
    assert cached.ref_model is None
    assert cached.precompute_reference(batches) == 4
    live.train()
    cached.train()
    for a, b in zip(live.state.log_history[:4], cached.state.log_history[:4], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    assert_close(cached_gradients.by_name, live_gradients.by_name)


def test_a_live_reference_fills_the_cache_as_pairs_come_by(tmp_path: Path) -> None:
    batches = batches_of(SAMPLES, 2)
    trainer, _ = our_trainer(
        lora(), batches, config(tmp_path, max_steps=4), cache=ReferenceCache(tmp_path / "cache", "x")
    )
    trainer.train()
    (part,) = (tmp_path / "cache").glob("*.part")
    size = part.stat().st_size
    again = ReferenceCache(tmp_path / "cache", "x")
    assert len(again) == 4
    second, _ = our_trainer(lora(), batches, config(tmp_path, max_steps=4), cache=again)
    second.train()
    losses = [[line["loss"] for line in t.state.log_history[:4]] for t in (trainer, second)]
    assert losses[0] == losses[1]
    assert part.stat().st_size == size


def test_a_missing_pair_stops_a_run_without_reference(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "cache", "x")
    batches = batches_of(SAMPLES, 2)
    trainer, _ = our_trainer(policy(), batches, config(tmp_path, max_steps=2), reference=Reference.cached, cache=cache)
    trainer.precompute_reference(batches[:1])
    with pytest.raises(ReferenceCacheError, match="lacks 2 of the 2 pairs"):
        trainer.train()


def test_figures_of_other_audio_are_noticed(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "cache", "x")
    batches = batches_of(SAMPLES, 4)
    trainer, _ = our_trainer(policy(), batches, config(tmp_path), reference=Reference.cached, cache=cache)
    trainer.precompute_reference(batches)
    batches[0]["mel"] = -3.0 * batches[0]["mel"]
    with pytest.raises(ReferenceCacheError, match="audio, its augmentation or the weights changed"):
        trainer.train()


def test_pair_keys_tell_pairs_apart_and_nothing_else() -> None:
    """Same id, prompt, clip lengths and answers, same key, whatever else is in the batch."""
    sample = random_pair(np.random.default_rng(0), (30,), num_rejected=2, name="a")
    other = random_pair(np.random.default_rng(0), (30,), num_rejected=2, name="b")
    alone, both = pack_preference([sample], BANDS)["pair_key"], pack_preference([other, sample], BANDS)["pair_key"]
    assert torch.equal(both[2:], alone)
    assert len({tuple(key) for key in both.tolist()}) == 4


def test_a_pair_with_other_audio_has_another_key() -> None:
    sample = random_pair(np.random.default_rng(0), (30,), name="a")
    louder = dataclasses.replace(sample, mels=(sample.mels[0] + 1e-3,))
    keys = [pack_preference([one], BANDS)["pair_key"] for one in (sample, louder)]
    assert not torch.equal(*keys)


def test_the_digest_is_that_of_the_policy_as_it_starts() -> None:
    """A fresh adapter changes nothing; one that is trained on is part of the reference."""
    digest = reference_digest(policy(0))
    assert digest == reference_digest(lora(0))
    assert digest != reference_digest(lora(0, trained=True))
    assert digest != reference_digest(policy(1))


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_evaluation_is_a_mean_over_pairs_and_leaves_no_trace(tmp_path: Path) -> None:
    unequal = [pack_preference(SAMPLES[:3], BANDS), pack_preference(SAMPLES[3:], BANDS), pack_preference([], BANDS)]
    whole = batches_of(SAMPLES, 4)
    results = []
    for eval_batches in (unequal, whole):
        trainer, kept = our_trainer(policy(0), whole, config(tmp_path), ref_model=policy(1), eval_batches=eval_batches)
        results.append(trainer.evaluate())
        assert kept.logs[-1]["eval_loss"] == results[-1]["eval_loss"]
        assert trainer._means("train") == {}
    assert results[0].keys() == results[1].keys()
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= results[0].keys()
    for name, value in results[0].items():
        assert value == pytest.approx(results[1][name], rel=1e-5, abs=1e-6), name


def test_evaluation_during_training(tmp_path: Path) -> None:
    batches = batches_of(SAMPLES, 4)
    args = config(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)
    trainer, kept = our_trainer(policy(0), batches, args, ref_model=policy(0), eval_batches=batches)
    trainer.train()
    evaluated = [line["eval_loss"] for line in kept.logs if "eval_loss" in line]
    trained = [line["loss"] for line in kept.logs if "loss" in line]
    assert evaluated[0] == pytest.approx(trained[1], abs=1e-5)  # after a step = before the next
    assert evaluated[1] < evaluated[0] < math.log(2)
