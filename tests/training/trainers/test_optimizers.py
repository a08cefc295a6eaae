"""AdamW on bfloat16 weights: it follows float32 where plain bfloat16 stands still, is unbiased, and resumes exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen2audio_train.training.stages.arguments import training_arguments
from qwen2audio_train.training.trainers.optimizers import AdamWBF16, store
from tests.runs import logged, recipe, train

RATE, STEPS = 1e-4, 300

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

STORED = {
    "stochastic": lambda p: AdamWBF16(p, RATE, kahan=False),
    "kahan": lambda p: AdamWBF16(p, RATE, kahan=True),
    "plain": lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.0),
}


def descend(make: Make, dtype: torch.dtype, steps: int = STEPS) -> Tensor:
    """How far weights came on a noisy quadratic whose minimum lies one tenth away from where they started; what a
    Kahan sum holds is part of its weight."""
    rng = torch.Generator().manual_seed(0)
    start = (1 + torch.rand(4096, generator=rng)).bfloat16()
    goal = start.float() + 0.1 * torch.randn(4096, generator=rng).sign()
    weight = nn.Parameter(start.to(dtype, copy=True))
    optimizer = make([weight])
    for _ in range(steps):
        noise = 0.1 * torch.randn(4096, generator=rng)
        weight.grad = (weight.detach().float() - goal + noise).to(dtype)
        optimizer.step()
    lost = optimizer.state[weight].get("lost", torch.zeros(()))
    return weight.detach().float() + lost.float() - start.float()


def test_bfloat16_follows_float32_where_it_would_stall() -> None:
    """300 steps of 1e-4 against weights between 1 and 2, whose neighbours are 2^-7 apart: plain updates all vanish."""
    exact = descend(STORED["plain"], torch.float32)
    assert exact.abs().mean() > 0.015
    assert torch.equal(descend(STORED["plain"], torch.bfloat16), torch.zeros(4096))
    for name, most in (("stochastic", 0.02), ("kahan", 0.005)):
        found = descend(STORED[name], torch.bfloat16)
        mean_way = (found * exact.sign()).mean() / exact.abs().mean()
        assert mean_way == pytest.approx(1, abs=most), name
    # each single weight too, within a fraction of bfloat16's resolution of 2^-7
    assert (descend(STORED["kahan"], torch.bfloat16) - exact).abs().max() < 2**-9


def test_float32_weights_are_trained_as_by_torch() -> None:
    ours = descend(lambda p: AdamWBF16(p, RATE, kahan=False, weight_decay=0.1), torch.float32, 20)
    theirs = descend(lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.1), torch.float32, 20)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_rounding_is_unbiased_and_takes_a_neighbour() -> None:
    value = torch.full((100_000,), 1 + 0.3 * 2**-7)
    target = torch.empty(100_000, dtype=torch.bfloat16)
    store(target, value, torch.Generator().manual_seed(0))
    assert set(target.float().tolist()) == {1.0, 1 + 2**-7}
    assert (target.float() == 1 + 2**-7).float().mean() == pytest.approx(0.3, abs=0.01)
    exact = torch.tensor([0.0, -1.5, 3e38, 2**-130])
    for special in (exact, torch.tensor([torch.inf, -torch.inf]), torch.tensor([0x7FFFFFFF], dtype=torch.int32)):
        value = special.view(torch.float32)
        kept = torch.empty(len(value), dtype=torch.bfloat16)
        store(kept, value, torch.Generator().manual_seed(1))
        assert torch.equal(kept.isnan(), value.isnan())
        assert torch.equal(kept.isinf(), value.isinf())
        assert torch.allclose(kept.float(), value, rtol=2**-7, equal_nan=True)


@pytest.mark.parametrize("kahan", [False, True])
def test_bytes_per_parameter(kahan: bool) -> None:
    weight = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = AdamWBF16([weight], RATE, kahan=kahan)
    optimizer.step()
    size = sum(value.numel() * value.element_size() for value in optimizer.state[weight].values())
    assert size == (6 if kahan else 4) * 1000


@pytest.mark.parametrize("kahan", [False, True])
def test_every_rank_rounds_alike_and_a_copy_goes_on_alike(kahan: bool) -> None:
    """Whatever else has drawn from torch's generator, and after a save and a load."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(50, 3, generator=rng).bfloat16()
    grads = torch.randn(6, 50, 3, generator=rng).bfloat16()
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [AdamWBF16([weight], RATE, kahan=kahan, seed=3) for weight in weights]
    for step, grad in enumerate(grads):
        if step == 3:
            state = copy.deepcopy(optimizers[1].state_dict())
            optimizers[1] = AdamWBF16([weights[1]], RATE, kahan=kahan, seed=3)
            optimizers[1].load_state_dict(state)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            torch.rand(1)
            weight.grad = grad.clone()
            optimizer.step()
    assert torch.equal(*weights)


BF16 = ("model.dtype=bfloat16", "trainer.optim=adamw_bf16_kahan")


def test_a_recipe_trains_with_it_and_resumes_to_the_bit(noise: Path, tmp_path: Path) -> None:
    whole = recipe(noise, tmp_path / "whole", *BF16, "trainer.save_strategy=steps", "trainer.save_steps=2")
    trainer: Any = train(whole)
    assert isinstance(trainer.optimizer.optimizer, AdamWBF16)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    half = str(tmp_path / "whole" / "checkpoint-2")
    again: Any = train(recipe(noise, tmp_path / "again", *BF16, f"resume={half}"))
    assert logged(recipe(noise, tmp_path / "again"), "loss") == logged(whole, "loss")[2:]
    for one, other in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_its_name_reaches_the_arguments(tmp_path: Path) -> None:
    arguments = training_arguments(recipe(tmp_path, tmp_path, *BF16, "trainer.adam_beta2=0.95"))
    assert arguments.optim == "adamw_bf16_kahan"
    assert arguments.adam_beta2 == 0.95
