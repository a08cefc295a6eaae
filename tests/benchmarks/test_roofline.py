"""The trace of a step counts what the formula counts, and the bound is the quotient that it says it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "gpu")]

import roofline  # noqa: E402
from workload import SHAPES  # noqa: E402

from qwen2audio_train.families.qwen2_audio import num_encoder_frames  # noqa: E402

SAMPLES = 3

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def traced() -> dict[str, dict[str, object]]:
    cases = ("full, full", "full, none", "LoRA, none", "LoRA without dropout, none")
    return {case: roofline.trace(case, "tiny", SAMPLES) for case in cases}


def attention_forward() -> int:
    """Operations of attention, forward, of the samples at the tiny shape: what a trace leaves out."""
    audio, text = SHAPES["tiny"]["audio_config"], SHAPES["tiny"]["text_config"]
    steps, tokens = num_encoder_frames(roofline.CLIP_FRAMES), 250 + roofline.PROMPT + roofline.LABELS
    heard = 4 * steps * steps * audio["d_model"] * audio["encoder_layers"]
    said = 4 * tokens * (tokens + 1) // 2 * text["hidden_size"] * text["num_hidden_layers"]
    return SAMPLES * (heard + said)


def test_traced_products_are_those_of_the_formula(traced: dict[str, dict[str, object]]) -> None:
    """Three passes of everything but attention; the first convolution has no gradient of its input."""
    found, width = traced["full, none"], SHAPES["tiny"]["audio_config"]["d_model"]
    first_convolution = SAMPLES * 2 * 3 * 128 * width * roofline.CLIP_FRAMES
    expected = found["useful"] - 3 * attention_forward() - first_convolution
    assert found["products"] == pytest.approx(expected, rel=0.01)


def test_checkpoints_repeat_products_and_bytes(traced: dict[str, dict[str, object]]) -> None:
    kept, repeated = traced["full, none"], traced["full, full"]
    assert repeated["useful"] == kept["useful"]
    assert 1.15 < repeated["products"] / kept["products"] < 4 / 3  # the head and the projector are not repeated
    assert sum(repeated["bytes"].values()) > 1.15 * sum(kept["bytes"].values())


def test_dropout_of_the_adapters_moves_bytes(traced: dict[str, dict[str, object]]) -> None:
    with_it, without = traced["LoRA, none"]["bytes"], traced["LoRA without dropout, none"]["bytes"]
    assert with_it["native_dropout"] > 0
    assert "native_dropout" not in without
    assert sum(with_it.values()) > sum(without.values())


def test_the_bound_is_useful_work_over_time_at_the_shares_of_peak_and_bandwidth() -> None:
    """A second of products at 72 % of 989.4 TFLOP/s, and one of bytes at 85 % of the H100's 3.35 TB/s."""
    second = {"products": 0.72 * 989.4e12, "useful": 0.72 * 989.4e12, "bytes": {"mul": 0.85 * 3.35e12}}
    assert roofline.bound(second, "H100") == pytest.approx(0.36)
    assert roofline.bound(second, "H200") == pytest.approx(0.72 / (1 + 3.35 / 4.8))
