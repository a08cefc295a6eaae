"""The command line of launch/plan.py."""

from __future__ import annotations

import pytest

from tests.launch.scripts import script


def run(*arguments: str) -> int:
    try:
        status: int = script("plan").main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return status


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stf"], "error: stf: no such stage; did you mean sft?"),
        (["encoder"], "error: encoder: no such stage; known here: dpo, pretrain, sft"),
        (["sft", "gpu=H1000"], "error: gpu: 'H1000' is no choice; did you mean H100?"),
        (["sft", "gpu_hours_price=2"], "error: gpu_hours_price: unknown key; did you mean gpu_hour_price?"),
        (["sft", "gpus=0"], "error: gpus: 0 is too small; expected 1 or more"),
        (["sft", "utilisation=40"], "error: utilisation: 40.0 is too large; expected 1 or less"),
        (["sft", "mode=find_bach"], "error: mode: 'find_bach' is no choice; did you mean find_batch?"),
        (["sft", "data.pack_per_step=2"], "error: data.pack_per_step: unknown key; did you mean data.packs_per_step?"),
        (["sft", "modl=tiny"], "error: modl: unknown key; did you mean model?"),
        (["sft", "model=tyny"], "error: model=tyny: no such choice; did you mean model=tiny?"),
        (["sft", "trainer.optim=adamw_bf16_kahan"], "error: this combination is not supported"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err.startswith(says)


def test_a_recipe_is_planned_for_named_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["model=qwen2_audio_7b", "trainer=pretrain_7b", "deepspeed=zero2", "data=none", "data.packs_per_step=64"]
    assert run("pretrain", *keys, "gpu=H200", "gpus=16", "gpu_hour_price=3", "clip_s=6") == 0
    printed = capsys.readouterr().out
    assert "100000 steps of 64 packs of at most 8192 tokens; 16 rank(s), 4 forward(s) each per step" in printed
    assert "~ 16 x H200" in printed
    assert "clip_s 6 (given), prompt_tokens 30 (assumed)" in printed
