"""Every file under recipes/ composes and plans its run without a network; every ablation changes something."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from qwen2audio_train.config.parts import PARTS
from qwen2audio_train.config.schema import StageConfig
from qwen2audio_train.planning import dry_run as plan
from qwen2audio_train.planning.dry_run import print_plan
from qwen2audio_train.training.chain import stage_configs
from qwen2audio_train.training.stages import arguments
from qwen2audio_train.training.stages.run import as_yaml
from tests.launch.scripts import RECIPES, SCHEMAS, composed
from tests.runs import recipe

STAGES = [name for name, schema in SCHEMAS.items() if schema is StageConfig]

GROUPS = sorted(path.name for path in RECIPES.iterdir() if path.is_dir())

CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((RECIPES / group).glob("*.yaml"))]

COMPANIONS = {
    "model=assembled": ["deepspeed=zero2", "trainer.bf16=true"],
    "model=assembled_qwen2_5_7b": ["deepspeed=zero2", "trainer.bf16=true"],
    "model=qwen2_audio_7b": ["deepspeed=zero2", "trainer.bf16=true"],
    "model=qwen2_audio_7b_instruct": ["deepspeed=zero2", "trainer.bf16=true"],
    "model=qwen2_audio": ["deepspeed=zero2", "trainer.bf16=true"],
    "model=qwen_audio": ["deepspeed=zero2", "trainer.bf16=true"],
    "model=qwen3_asr_1_7b": ["deepspeed=zero2", "trainer.bf16=true"],
    "deepspeed=zero2_offload": ["trainer.optim=adamw_torch"],
    "deepspeed=zero3_offload": ["trainer.optim=adamw_torch"],
}
"""What a choice needs beside it."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def stages_of(name: str) -> list[str]:
    """The stages that a choice is for: the one it is named after, or all."""
    named = [stage for stage in STAGES if re.search(rf"(^|_){stage}(_|$)", name)]
    return named or STAGES


def plan_of(config: StageConfig, capsys: pytest.CaptureFixture[str]) -> str:
    print_plan(config)
    return capsys.readouterr().out


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_composes_and_plans(group: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    choice = f"{group}={name}"
    configs = [composed(stage, choice, *COMPANIONS.get(choice, [])) for stage in stages_of(name)]
    plan = plan_of(configs[0], capsys)
    assert re.search(r"^language_model +[\d,]+ +[\d,]+$", plan, re.MULTILINE)
    assert re.search(r"^\d+ steps of \d+ packs of at most \d+ (tokens|samples); 1 rank\(s\), \d+ forward", plan, re.M)


@pytest.mark.parametrize("root", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_root_composes(root: str) -> None:
    given = {"evaluate": ["checkpoint=x"], "export": ["checkpoint=x", "output_dir=y"]}
    composed(root, *given.get(root, []))


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_plans_as_it_is(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_of(composed(stage), capsys).startswith(f"stage {stage}, run folder runs/{stage}")


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "ablation"])
def test_every_ablation_changes_something(name: str) -> None:
    text = (RECIPES / "ablation" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# Question: ")
    assert "Baseline: " in text
    changed = [stage for stage in STAGES if as_yaml(composed(stage)) != as_yaml(composed(stage, f"ablation={name}"))]
    assert changed


@pytest.mark.parametrize(
    ("root", "bins", "style"), [("qwen_audio", 80, "hierarchical_tags"), ("qwen2_audio", 128, "natural")]
)
def test_the_presets_train_what_the_papers_train(root: str, bins: int, style: str) -> None:
    stages = stage_configs(composed(root), lambda name, overrides: composed(name, *overrides))
    first, second = stages["pretrain"], stages["sft"]
    language = {"language_model", "embed_tokens", "lm_head"}
    assert {part for part in PARTS if getattr(first.model.freeze, part)} == language
    assert {part for part in PARTS if getattr(second.model.freeze, part)} == set(PARTS) - language
    assert (first.model.num_mel_bins, first.data.prompt_style, first.optimizer.encoder_layer_decay) == (
        bins,
        style,
        0.95,
    )
    for data in (first.data, second.data):  # LibriSpeech Basic of arXiv:1904.08779, table 1: W, F, m_F, T, p, m_T
        basic = data.augment
        masks = (basic.freq_mask_bins, basic.num_freq_masks, basic.time_mask_frames, basic.time_mask_share)
        assert (basic.spec_augment, basic.time_warp, *masks, basic.num_time_masks) == (1.0, 80, 27, 1, 100, 1.0, 1)
    assert {name: group.weight for name, group in first.data.groups.items()} == {
        "speech": 370,
        "sound": 10,
        "music": 140,
    }
    assert second.init_from == f"runs/{root}/pretrain"


def counts_of(plan: str, row: str) -> list[str]:
    (line,) = [line for line in plan.splitlines() if line.startswith(row)]
    return re.split(r" {2,}", line)[1:]


def test_the_plan_counts_what_is_there(noise: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against figures worked out by hand from the architecture and the manifests."""
    bad = noise / "with_bad_lines.jsonl"
    bad.write_text((noise / "speech.jsonl").read_text() + '{"id": "x"}\nnonsense\n')
    config = recipe(noise, noise / "run", f"data.sources.speech.path=[{bad}]", "trainer.save_total_limit=3")
    plan = plan_of(config, capsys)
    d, ffn, mel, width = 16, 32, 16, 32
    convolutions = 3 * mel * d + d + 3 * d * d + d
    layer = 4 * d * d + 3 * d + 2 * d * ffn + ffn + d + 4 * d  # k_proj has no bias; two norms
    tower = convolutions + 1500 * d + layer + 2 * d
    assert counts_of(plan, "audio_tower") == [f"{tower:,}", f"{tower - 1500 * d:,}"]
    assert counts_of(plan, "multi_modal_projector") == [f"{d * width + width:,}"] * 2
    assert counts_of(plan, "lm_head") == [f"{300 * width:,}"] * 2
    examples, hours, audio, _, bad_lines = counts_of(plan, "speech")
    assert (examples, bad_lines) == ("24", "2")
    assert 24 * 0.1 / 3600 - 0.01 <= float(hours) <= 24 * 0.6 / 3600 + 0.01
    assert 24 * 2 <= int(audio) <= 24 * 15
    assert counts_of(plan, "sound")[0] == "12"
    assert "4 steps of 4 packs of at most 100 tokens; 1 rank(s), 4 forward(s) each per step" in plan
    assert "3 are kept" in plan


def test_a_plan_with_an_adapter_trains_only_that(noise: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(recipe(noise, noise / "run", "adapter.kind=lora", "adapter.r=2"), capsys)
    assert counts_of(plan, "audio_tower")[1] == "0"
    attention, mlp = 4 * (32 + 32) * 2, 3 * (32 + 48) * 2
    assert counts_of(plan, "language_model")[1] == f"{2 * (attention + mlp):,}"


def test_the_plan_follows_the_number_of_ranks(
    noise: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (arguments, plan):
        monkeypatch.setattr(module, "world_size", lambda: 3)
    config = recipe(noise, noise / "run", "data.packs_per_step=8", "data.packs_per_forward=2")
    assert "3 rank(s), 2 forward(s) each per step" in plan_of(config, capsys)


def test_released_models_have_their_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(composed("sft", "model=qwen2_audio_7b_instruct", "trainer=sft_7b", "deepspeed=zero2"), capsys)
    sizes = {part: int(counts_of(plan, part)[0].replace(",", "")) / 1e6 for part in PARTS}
    assert round(sizes["audio_tower"], 1) == 637.0
    assert round(sizes["multi_modal_projector"], 1) == 5.2
    assert round(sum(sizes.values()), 1) == 8397.1
