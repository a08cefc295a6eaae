"""DPO on two ranks, one of them with a filler, and under ZeRO-3, against one process that holds all pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.dpo_worker import main
from tests.distributed.ranks import run_ranks
from tests.distributed.train_worker import Job, as_json, run

COMPARED = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected", "entropy", "logits/chosen")


def run_two(mode: str, folder: Path) -> dict[str, Any]:
    """What rank 0 of `dpo_worker` wrote."""
    run_ranks("tests.distributed.dpo_worker", mode, folder)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def run_alone(mode: str, folder: Path) -> dict[str, Any]:
    main(mode, folder)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for ours, theirs in zip(found["log"][:2], expected["log"][:2], strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
    assert found["digest"] == expected["digest"]
    for name, value in expected["held_out"].items():
        assert found["held_out"][name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "cached"])
def test_two_ranks_equal_one(mode: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    found = run_two(mode, tmp_path / "two")
    assert_same_run(found, run_alone(mode, tmp_path / "one"))
    assert found["cached"] == (3 if mode == "cached" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "adapter", "cached"])
def test_zero_3_equals_one_process(mode: str, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert_same_run(run_two(f"zero3-{mode}", tmp_path / "two"), run_alone(mode, tmp_path / "one"))


@pytest.mark.slow
def test_zero_3_fills_an_empty_store(noise: Path, tmp_path: Path) -> None:
    """Every tensor is cut up from its loading on; the reference is asked before the engine that trains is there."""
    steps = ("trainer.save_strategy='no'", "data.tokens_per_pack=200", "data.packs_per_step=3")
    run(noise, tmp_path, Job("base", ("trainer.max_steps=1", "trainer.save_strategy=steps", "trainer.save_steps=1")))
    cached = (*steps, f"init_from={tmp_path}/base", "preference.reference=cached", "trainer.max_steps=3")
    zero = ("deepspeed.stage=3", "deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0")
    one = Job("one", (*cached, f"preference.cache_dir={tmp_path}/a"), ("pairs",))
    two = Job("two", (*cached, *zero, f"preference.cache_dir={tmp_path}/b"), ("pairs",))
    run(noise, tmp_path, one)
    run_ranks("tests.distributed.train_worker", noise, tmp_path, as_json([two]))
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    for ours, theirs in zip(*logs, strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
