from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Qwen2AudioForConditionalGeneration

from qwen2audio_train.config.schema import AdapterConfig, AdapterKind
from qwen2audio_train.model.adapters import apply_adapter, load_adapter, merge_adapter
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import pack, pad, random_row, tiny_config

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
