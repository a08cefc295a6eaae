from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from qwen2audio_train.config.parts import FreezeConfig
from qwen2audio_train.config.schema import AdapterConfig, AdapterKind
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.freeze import (
    PARTS,
    parameter_groups,
    part_of,
    set_trainable,
)
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import pack, random_row, tiny_config


@pytest.fixture
def model() -> PackedQwen2Audio:
    torch.manual_seed(0)
    return PackedQwen2Audio(tiny_config())


@pytest.mark.parametrize("frozen", PARTS)
def test_freezing_a_part_freezes_it_alone(model: PackedQwen2Audio, frozen: str) -> None:
    set_trainable(model, FreezeConfig(**{frozen: True}))
    for name, parameter in model.named_parameters():
        fixed = part_of(name, model.family) == frozen or name.endswith("embed_positions.weight")
        assert parameter.requires_grad is not fixed, name


def test_every_trainable_parameter_is_in_one_group(model: PackedQwen2Audio) -> None:
    set_trainable(model, FreezeConfig(embed_tokens=True))
    groups = parameter_groups(model, 1e-4, {"audio_tower": 1e-5}, weight_decay=0.1, encoder_layer_decay=0.95)
    grouped = [id(p) for g in groups for p in g["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_rates_and_decay_of_single_parameters(model: PackedQwen2Audio) -> None:
    set_trainable(model, FreezeConfig())
    groups = parameter_groups(model, 1e-4, {"audio_tower": 1e-5}, weight_decay=0.1, encoder_layer_decay=0.9)
    of = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    tower, language_model = model.model.audio_tower, model.model.language_model
    assert of[id(tower.layer_norm.weight)] == (1e-5, 0.0)
    assert of[id(tower.layers[1].fc1.weight)] == (1e-5, 0.1)
    assert of[id(tower.layers[0].fc1.weight)] == pytest.approx((0.9e-5, 0.1))
    assert of[id(tower.layers[0].fc1.bias)] == pytest.approx((0.9e-5, 0.0))
    assert of[id(tower.conv1.weight)] == pytest.approx((0.81e-5, 0.1))
    assert of[id(language_model.layers[0].mlp.up_proj.weight)] == (1e-4, 0.1)
    assert of[id(language_model.embed_tokens.weight)] == (1e-4, 0.1)
    assert of[id(model.lm_head.weight)] == (1e-4, 0.1)


def test_a_rate_for_a_frozen_part_is_refused(model: PackedQwen2Audio) -> None:
    set_trainable(model, FreezeConfig(audio_tower=True))
    with pytest.raises(ValueError, match="audio_tower has no trainable parameter"):
        parameter_groups(model, 1e-4, {"audio_tower": 1e-5})


def test_groups_of_an_adapted_model_hold_the_adapter_alone(model: PackedQwen2Audio) -> None:
    adapted = apply_adapter(model, AdapterConfig(kind=AdapterKind.lora, modules=["language_model", "audio_tower"]))
    assert isinstance(adapted, PeftModel)
    groups = parameter_groups(adapted, 1e-4, {"audio_tower": 1e-5}, encoder_layer_decay=0.9)
    names = {id(p): n for n, p in adapted.named_parameters()}
    assert all("lora_" in names[id(p)] for g in groups for p in g["params"])
    assert sorted({g["lr"] for g in groups}) == pytest.approx([0.9e-5, 1e-5, 1e-4])


def test_a_frozen_tower_keeps_no_graph(model: PackedQwen2Audio) -> None:
    batch = pack([random_row(torch.Generator().manual_seed(0), (40,))])
    assert model.model.encode(batch["mel"], batch["clip_frames"]).requires_grad
    set_trainable(model, FreezeConfig(audio_tower=True, multi_modal_projector=True))
    assert not model.model.encode(batch["mel"], batch["clip_frames"]).requires_grad
