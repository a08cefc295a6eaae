"""DPO on two ranks, one of them with a filler, and under ZeRO-3, against one process that holds all pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.dpo_worker import main
from tests.distributed.ranks import run_ranks

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
