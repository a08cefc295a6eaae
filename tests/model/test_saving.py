"""Weights and names across our class, the stock class and the published names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2AudioForConditionalGeneration

from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import tiny_config


@pytest.fixture
def model() -> PackedQwen2Audio:
    torch.manual_seed(0)
    return PackedQwen2Audio(tiny_config())


def published(name: str) -> str:
    """Name of a weight in the published checkpoints, given its name in transformers 5."""
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1)


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def rewrite_names(folder: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})


def test_saved_names_and_architecture_are_the_published_ones(model: PackedQwen2Audio, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(map(published, model.state_dict()))
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["architectures"] == ["Qwen2AudioForConditionalGeneration"]
    assert "packed" not in text
    assert "attn_implementation" not in text


def test_our_folder_loads_in_the_stock_class_and_back(model: PackedQwen2Audio, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    stock = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert_same_weights(stock, model)
    stock.save_pretrained(tmp_path / "stock")
    assert_same_weights(PackedQwen2Audio.from_pretrained(tmp_path / "stock"), model)


@pytest.mark.parametrize("naming", ["published", "transformers 5"])
def test_both_namings_load_and_are_saved_as_published(model: PackedQwen2Audio, tmp_path: Path, naming: str) -> None:
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    rewrite_names(tmp_path, {published(k): v for k, v in state.items()} if naming == "published" else state)
    loaded, report = PackedQwen2Audio.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_weights(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(load_file(tmp_path / "again" / "model.safetensors")) == sorted(map(published, state))


def test_a_given_state_dict_is_saved_under_the_published_names(model: PackedQwen2Audio, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, state_dict={k: v + 1 for k, v in model.state_dict().items()})
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["language_model.lm_head.weight"], model.lm_head.weight + 1)


def test_shards(model: PackedQwen2Audio, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(PackedQwen2Audio.from_pretrained(tmp_path), model)


def test_unwrap(model: PackedQwen2Audio) -> None:
    assert unwrap(model) is model
    assert unwrap(nn.Sequential(model)) is model
    with pytest.raises(TypeError, match="found 0"):
        unwrap(model.lm_head)
