from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Qwen2AudioForConditionalGeneration

from qwen2audio_train.config.schema import (
    AdapterConfig,
    AdapterKind,
    ConfigError,
    InitLora,
    StageConfig,
    load_config,
)
from qwen2audio_train.model.adapters import apply_adapter, load_adapter, merge_adapter
from qwen2audio_train.model.freeze import parameter_groups
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import pack, pad, random_row, tiny_config

PISSA = {"kind": "lora", "init_lora_weights": "pissa"}
PARTS = ["language_model", "audio_tower", "multi_modal_projector"]


@pytest.fixture
def model() -> PackedQwen2Audio:
    torch.manual_seed(0)
    return PackedQwen2Audio(tiny_config())


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return pack([random_row(torch.Generator().manual_seed(i), f) for i, f in enumerate([(40,), (), (7, 9)])])


def lora(**changes: object) -> AdapterConfig:
    return AdapterConfig(kind=AdapterKind.lora, r=4, **changes)


def train_one_step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # B starts at zero, so that A only moves in the second step
        optimizer.zero_grad()
        model(**batch).nll_sum.backward()
        optimizer.step()


@pytest.mark.parametrize("part", PARTS)
def test_only_the_named_part_is_adapted_and_nothing_else_moves(
    model: PackedQwen2Audio, batch: dict[str, Tensor], part: str
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = apply_adapter(model, lora(modules=[part]))
    trainable = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trainable
    assert all(f".{part}." in name and "lora_" in name for name in trainable)
    train_one_step(adapted, batch)
    after = {name.replace(".base_layer", ""): value for name, value in unwrap(adapted).state_dict().items()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    moved = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert all(p.abs().sum() > 0 for p in moved)


def test_every_linear_layer_of_a_part_is_hit(model: PackedQwen2Audio) -> None:
    adapted = apply_adapter(model, lora(modules=PARTS))
    hit = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert len(hit) == 2 * 7 + 2 * 6 + 1


@pytest.mark.parametrize("saved", ["multi_modal_projector", "lm_head", "embed_tokens", "audio_tower"])
def test_a_fully_trained_part_beside_the_adapter(model: PackedQwen2Audio, batch: dict[str, Tensor], saved: str) -> None:
    adapted = apply_adapter(model, lora(modules_to_save=[saved]))
    train_one_step(adapted, batch)
    copies = {n: p for n, p in adapted.named_parameters() if ".modules_to_save." in n and p.requires_grad}
    assert copies
    originals = dict(adapted.named_parameters())
    for name, parameter in copies.items():
        original = originals[name.replace("modules_to_save.default", "original_module")]
        if not name.endswith("k_proj.bias"):
            assert not torch.equal(parameter, original), name


def test_a_new_adapter_changes_no_output(model: PackedQwen2Audio, batch: dict[str, Tensor]) -> None:
    before = model.eval()(**batch).nll
    after = apply_adapter(model, lora(modules=PARTS, modules_to_save=["lm_head"])).eval()(**batch).nll
    assert torch.equal(before, after)


@pytest.mark.parametrize("use_dora", [False, True])
def test_save_load_and_merge(model: PackedQwen2Audio, batch: dict[str, Tensor], tmp_path: Path, use_dora: bool) -> None:
    model.save_pretrained(tmp_path / "base")
    adapted = apply_adapter(model, lora(modules=PARTS, modules_to_save=["lm_head"], use_dora=use_dora))
    train_one_step(adapted, batch)
    trained = adapted.eval()(**batch).nll
    adapted.save_pretrained(str(tmp_path / "adapter"))

    base = PackedQwen2Audio.from_pretrained(tmp_path / "base")
    loaded = load_adapter(base, str(tmp_path / "adapter"), trainable=False).eval()
    assert torch.allclose(loaded(**batch).nll, trained, atol=1e-6)
    merged = merge_adapter(loaded)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.allclose(merged(**batch).nll, trained, atol=1e-5)


def test_an_adapter_loads_in_plain_transformers_and_peft(
    model: PackedQwen2Audio, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "base")
    adapted = apply_adapter(model, lora(modules=PARTS, modules_to_save=["lm_head"]))
    train_one_step(adapted, batch)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    rng = torch.Generator().manual_seed(3)
    row = random_row(rng, (40,))
    ours = adapted.eval()(**pack([row]))
    stock = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "base")
    plain = PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    theirs = plain(**pad([row], rng))
    assert torch.allclose(ours.nll.mean(), theirs.loss, rtol=1e-5)


def test_unknown_parts_are_refused(model: PackedQwen2Audio) -> None:
    with pytest.raises(ValueError, match=r"adapter\.modules: found q_proj"):
        apply_adapter(model, lora(modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapter\.modules_to_save: found head"):
        apply_adapter(model, lora(modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"adapter\.modules: empty"):
        apply_adapter(model, lora(modules=[]))


def test_no_adapter_leaves_the_model_alone(model: PackedQwen2Audio) -> None:
    assert apply_adapter(model, AdapterConfig()) is model


def test_pissa_starts_with_the_outputs_of_its_base(model: PackedQwen2Audio, batch: dict[str, Tensor]) -> None:
    """To float32's rounding; the adapter holds each layer's largest singular values, the base the rest."""
    before = model.eval()(**batch).nll
    name = "model.language_model.layers.0.mlp.up_proj"
    whole = model.get_submodule(name).weight.clone()
    adapted = apply_adapter(model, lora(modules=PARTS, alpha=8, init_lora_weights=InitLora.pissa)).eval()
    layer = unwrap(adapted).get_submodule(name)
    low_rank = layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(low_rank) == 4
    torch.testing.assert_close(
        torch.linalg.svdvals(low_rank)[:4], torch.linalg.svdvals(whole)[:4], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(layer.base_layer.weight + low_rank, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(adapted(**batch).nll, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"init_lora_weights": InitLora.pissa}, {"use_rslora": True}, {"use_dora": True}])
def test_variants_of_lora_are_saved_loaded_and_merged(
    model: PackedQwen2Audio, batch: dict[str, Tensor], tmp_path: Path, changes: dict[str, object]
) -> None:
    model.save_pretrained(tmp_path / "base")
    adapted = apply_adapter(model, lora(modules=PARTS, **changes))
    train_one_step(adapted, batch)
    adapted.save_pretrained(tmp_path / "adapter")
    trained = adapted.eval()(**batch).nll
    base = PackedQwen2Audio.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(base(**batch).nll, trained, atol=1e-3)
    loaded = load_adapter(base, str(tmp_path / "adapter"), trainable=False).eval()
    torch.testing.assert_close(loaded(**batch).nll, trained, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merge_adapter(loaded)(**batch).nll, trained, atol=1e-4, rtol=1e-4)


def test_rslora_scales_by_the_root_of_the_rank(model: PackedQwen2Audio) -> None:
    adapted = apply_adapter(model, lora(alpha=8, use_rslora=True))
    assert unwrap(adapted).get_submodule("model.language_model.layers.0.mlp.up_proj").scaling == {"default": 8 / 4**0.5}


def test_lora_plus_speeds_up_the_b_matrices_alone(model: PackedQwen2Audio) -> None:
    adapted = apply_adapter(model, lora(modules=PARTS, modules_to_save=["lm_head"]))
    names = {id(p): name for name, p in adapted.named_parameters()}
    rates = {"audio_tower": 2e-4}
    groups = parameter_groups(adapted, 1e-4, rates, encoder_layer_decay=0.5, loraplus_lr_ratio=16.0)
    assert len({group["name"] for group in groups}) == len(groups)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            rate = 2e-4 * (0.5 if ".layers.0." in name else 1.0) if "audio_tower" in name else 1e-4
            assert group["lr"] == pytest.approx(rate * (16 if ".lora_B." in name else 1)), name
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in adapted.parameters())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimizer": {"loraplus_lr_ratio": 16}}, "loraplus_lr_ratio=16.0: there is no adapter"),
        ({"stage": "dpo", "adapter": PISSA}, "is no reference"),
        ({"adapter": {**PISSA, "use_dora": True}}, "not combined with adapter.use_dora"),
        ({"adapter": PISSA, "deepspeed": {"stage": 3}}, "set deepspeed.stage=2"),
    ],
)
def test_what_a_variant_cannot_be_combined_with(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"stage": "sft", "name": "x", "model": {"kind": "tiny"}, **keys}, StageConfig)
