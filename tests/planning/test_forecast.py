"""The forecast of a recipe against figures worked out by hand, and the search for the largest pack."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.planning import find_batch
from qwen2audio_train.planning.cost import MEMORY_BYTES
from qwen2audio_train.planning.dry_run import make_plan
from qwen2audio_train.planning.find_batch import attempt, largest, print_largest_pack
from qwen2audio_train.planning.forecast import Forecast, PlanOptions, forecast, print_forecast, typical_sample
from qwen2audio_train.planning.peak_memory import PeakMemory
from tests.launch.scripts import composed
from tests.runs import pairs_recipe, recipe

SEVEN_B = ("model=qwen2_audio_7b_instruct", "data=none")
LORA = (*SEVEN_B, "adapter=lora", "trainer=lora_7b")
FULL = (*SEVEN_B, "trainer=sft_7b")
TEN_SECONDS = PlanOptions(clip_s=10, prompt_tokens=30, label_tokens=40)


def forecast_of(options: PlanOptions, *overrides: str, stage: str = "sft") -> Forecast:
    plan = make_plan(composed(stage, *overrides), options.gpus)
    return forecast(plan, typical_sample(plan, options), options)


def test_lora_on_one_gpu() -> None:
    found = forecast_of(dataclasses.replace(TEN_SECONDS, gpu="H200", utilisation=0.5), *LORA)
    assert (found.samples, found.load.tokens, found.load.audio_s) == (25, 25 * 320, 250)
    assert found.memory.weights == pytest.approx(2 * 8_397_093_888 + 4 * 39_976_960, rel=1e-3)
    assert found.memory.gradients == 4 * 39_976_960
    assert found.memory.optimizer == 8 * 39_976_960
    # forward, recomputed forward and the backward of the inputs in the language model; a frozen tower runs once
    language, tower = 13.0e9 * 320, 66e9 * 10
    assert found.speed.step_s == pytest.approx(25 * (3 * language + tower) / (0.5 * 989.4e12), rel=0.05)
    assert found.useful_share == pytest.approx((2 * language + tower) / (3 * language + tower), rel=0.02)
    assert found.traffic == 0


@pytest.mark.parametrize(
    ("overrides", "gpus", "bytes_per_parameter"),
    [
        (("deepspeed=zero1", "data.packs_per_step=64"), 8, 4 + 12 / 8),
        (("deepspeed=zero3", "data.packs_per_step=64"), 8, 16 / 8),
        (("deepspeed=zero2", "data.packs_per_step=128"), 8, 2 + (4 + 12) / 8),  # sixteen forwards are summed in float32
        (("deepspeed=zero2_offload", "trainer.optim=adamw_torch", "data.packs_per_step=64"), 8, 2 + 2 / 8),
        (("trainer.optim=adamw_bf16_stochastic",), 1, 8),
        (("trainer.optim=adamw_bf16_kahan",), 1, 10),
        (("model.dtype=float32", "trainer.bf16=false"), 1, 16),
        (("model.dtype=float32", "trainer.optim=adamw_bnb_8bit", "trainer.bf16=false"), 1, 10.03),
    ],
)
def test_full_fine_tuning(overrides: tuple[str, ...], gpus: int, bytes_per_parameter: float) -> None:
    memory = forecast_of(dataclasses.replace(TEN_SECONDS, gpus=gpus), *FULL, *overrides).memory
    states = memory.weights + memory.gradients + memory.optimizer
    # the encoder's fixed positions are not trained
    assert states == pytest.approx(bytes_per_parameter * 8_397_093_888, rel=1e-3)


def test_what_is_offloaded_lies_on_the_host() -> None:
    options = dataclasses.replace(TEN_SECONDS, gpus=8)
    offload = forecast_of(options, *FULL, "deepspeed=zero3_offload", "trainer.optim=adamw_torch").memory
    assert (offload.weights, offload.optimizer) == (0, 0)
    assert offload.host == pytest.approx(14 * 8_397_093_888 / 8, rel=1e-3)


def test_a_frozen_reference_is_a_second_copy_and_a_second_forward() -> None:
    overrides = (*SEVEN_B, "trainer=dpo_7b", "deepspeed=zero2", "data.samples_per_pack=4")
    options = dataclasses.replace(TEN_SECONDS, gpus=8)
    frozen = forecast_of(options, *overrides, stage="dpo")
    cached = forecast_of(options, *overrides, "preference.reference=cached", stage="dpo")
    assert frozen.memory.weights == pytest.approx(2 * cached.memory.weights)
    assert cached.speed.step_s < frozen.speed.step_s < 1.4 * cached.speed.step_s
    assert frozen.load.tokens == 4 * (250 + 30 + 2 * 40)
    trunk, answer = 280, 40
    assert frozen.load.pairs == 4 * (trunk * (trunk + 1) // 2 + 2 * (answer * trunk + answer * (answer + 1) // 2))


def test_samples_are_those_of_the_manifests(noise: Path) -> None:
    plan = make_plan(recipe(noise, noise / "run"))
    typical = typical_sample(plan, PlanOptions())
    assert 0.1 < typical.clip_s < 0.6
    assert "mean of the manifests" in typical.origin
    given = typical_sample(plan, PlanOptions(clip_s=3))
    assert given.clip_s == 3
    assert given.label_tokens == typical.label_tokens
    # one source in four draws, of two that are drawn alike
    weights = ("data.sources.speech.weight=1", "data.sources.sound.weight=1")
    speech, sound = (plan.counts[name].audio_s / plan.counts[name].examples for name in ("speech", "sound"))
    mixed = typical_sample(make_plan(recipe(noise, noise / "run", *weights)), PlanOptions())
    assert mixed.clip_s == pytest.approx((speech + sound) / 2)
    pairs = typical_sample(make_plan(pairs_recipe(noise, noise / "run")), PlanOptions())
    assert pairs.answers == 2
    assert pairs.label_tokens < 30


def test_what_it_prints_says_what_it_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    options = PlanOptions(gpu="H200", gpus=8, gpu_hour_price=2.5)
    found = print_forecast(make_plan(composed("sft", *FULL, "deepspeed=zero2"), 8), options)
    printed = capsys.readouterr().out
    for word in ("fits", "GPU hours", "cost", "MFU", "clip_s 10 (assumed)", "40%", "not in its time", "audio-hours"):
        assert word in printed
    assert found.memory.total < MEMORY_BYTES["H200"]
    print_forecast(make_plan(composed("sft", *FULL, "trainer.optim=adamw_bf16_kahan")), PlanOptions(gpu="L40S"))
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "overrides", "says"),
    [
        ("encoder", (), "stage=encoder"),
        ("sft", ("data.tokens_per_pack=100",), "data.tokens_per_pack=100: the typical sample has 320 tokens"),
        ("sft", (*SEVEN_B, "adapter=qlora"), "adapter.kind=qlora"),
    ],
)
def test_what_cannot_be_forecast_is_said(stage: str, overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        forecast_of(TEN_SECONDS, *overrides, stage=stage)


# The search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("border", [0, 1, 2, 5, 31, 32, 1000])
def test_the_search_ends_at_the_border(border: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= border

    assert largest(fits, most=1000) == border
    assert len(tried) == len(set(tried)) <= 2 * max(border, 1).bit_length() + 1


def test_out_of_memory_is_an_answer() -> None:
    def step(samples: int) -> None:
        if samples > 3:
            raise torch.OutOfMemoryError

    memory = PeakMemory()
    assert largest(lambda samples: attempt(step, samples, memory) is not None) == 3


def test_the_peak_is_what_was_held() -> None:
    """Of each trial alone: what a larger one before it had freed does not count."""
    memory = PeakMemory()

    def step(samples: int) -> None:
        blocks = [torch.ones(2**20, dtype=torch.float32) for _ in range(samples)]
        del blocks

    small, large, again = (attempt(step, samples, memory) for samples in (1, 65, 1))
    assert small is not None
    assert large is not None
    assert again is not None
    assert large.peak_bytes - small.peak_bytes == pytest.approx(64 * 2**22, rel=0.1)
    assert large.peak_bytes - again.peak_bytes == pytest.approx(64 * 2**22, rel=0.1)


def counted_steps(per_sample: int) -> Callable[..., tuple[Callable[[int], object], None]]:
    """A stepper whose steps hold so many bytes for every sample."""
    return lambda *_: (lambda samples: torch.ones(samples * per_sample, dtype=torch.uint8), None)


def test_it_finds_the_pack_of_a_limit(
    noise: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(find_batch, "stepper", counted_steps(2**24))
    plan = make_plan(recipe(noise, noise / "run"))
    found = print_largest_pack(plan, PlanOptions(limit_gib=0.25))
    assert found.samples == pytest.approx(16, abs=1)
    tokens = typical_sample(plan, PlanOptions()).load.tokens
    assert f"data.tokens_per_pack={found.samples * tokens} fits" in capsys.readouterr().out


def test_it_trains_the_recipe_for_real(noise: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real steps on the CPU: a pack ten times as large takes more, and the limit holds."""
    config = recipe(noise, noise / "run", "model.architecture.text_config.intermediate_size=2048")
    options = PlanOptions(limit_gib=0.1, clip_s=5, label_tokens=40, prompt_tokens=20)
    found = print_largest_pack(make_plan(config), options)
    assert 1 <= found.samples < 60
    assert found.peak_bytes <= 0.1 * 2**30
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "overrides", "options", "says"),
    [
        ("dpo", (), PlanOptions(limit_gib=1), "only pretrain and sft have a token budget"),
        ("sft", ("deepspeed=zero2",), PlanOptions(limit_gib=1), "tries one process"),
        ("sft", (), PlanOptions(limit_gib=1, gpus=2), "tries one process"),
        ("sft", (), PlanOptions(), "limit_gib: no value was given"),
    ],
)
def test_what_cannot_be_tried_is_said(stage: str, overrides: tuple[str, ...], options: PlanOptions, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_batch.check(composed(stage, *overrides), options)
