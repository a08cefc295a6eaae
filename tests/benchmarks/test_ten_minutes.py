"""The whole path of the script for a GPU, at a tiny shape on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu" / "ten_minutes.py"
sys.path.insert(0, str(SCRIPT.parent))
sys.path.insert(0, str(SCRIPT.parents[1]))

pytestmark = pytest.mark.slow


def lines(out: Path, *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--shape", "tiny", "--clips", "4", "--rounds", "1"]
    command += ["--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept == [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"part"')]
    return kept


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return lines(tmp_path_factory.mktemp("ten") / "lines", "--dtype", "float32", "--minutes", "60")


def of(found: list[dict[str, Any]], part: str, key: str) -> list[Any]:
    return [line[key] for line in found if line["part"] == part and key in line]


def test_no_part_fails(found: list[dict[str, Any]]) -> None:
    assert [line for line in found if "error" in line] == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_all_arms_take_the_same_step(kind: str, found: list[dict[str, Any]]) -> None:
    """Loss and gradient norm of the first step, whatever the arm; frozen parts and dropout are the same too."""
    firsts = {
        line["part"]: (line["loss"], line["grad_norm"])
        for line in found
        if line["part"].startswith(f"{kind}.") and line.get("step") == 1
    }
    assert len(firsts) >= 2
    for first in firsts.values():
        assert first == pytest.approx(firsts[f"{kind}.ours"], rel=1e-4)


def test_packed_gradients_are_those_of_the_padded_rows(found: list[dict[str, Any]]) -> None:
    ours, stock = of(found, "parity", "gradient_error")
    assert ours < 1e-4
    assert stock == 0


def test_the_summary_sets_every_arm_beside_ours(found: list[dict[str, Any]]) -> None:
    over = found[-1]["seconds_over_ours"]
    assert set(over["full"]) == {"stock"}
    assert {"stock", "trl_sft", "without_label_head"} < set(over["lora"])
    assert over["dpo"].keys() == {"stock"}
    (audio,) = of(found, "full.ours", "audio_hours_per_hour")
    assert audio > 0


def test_memory_stands_beside_its_forecast(found: list[dict[str, Any]]) -> None:
    for part in ("memory.lora", "memory.full"):
        (peak,), (expected,) = of(found, part, "peak_mib"), of(found, part, "forecast_mib")
        assert min(peak, expected) > 0


def test_a_part_that_fails_or_takes_too_long_is_a_line(tmp_path: Path) -> None:
    """A second for a part is too little; one clip is too few for the stock path's forwards."""
    found = lines(tmp_path / "late", "--dtype", "bfloat16", "--parts", "parity", "--minutes", "0.01")
    assert [sorted(line) for line in found] == [["error", "part"], ["part", "seconds_over_ours"]]
    assert "not done within" in found[0]["error"]
    one_clip = ("--clips", "1", "--minutes", "60")
    found = lines(tmp_path / "small", "--dtype", "float32", "--parts", "full.stock", "device", *one_clip)
    (error,) = of(found, "full.stock", "error")
    assert "ValueError: batch_size should be a positive integer" in error
    assert of(found, "device", "matrix_tflops")
