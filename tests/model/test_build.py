from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.whisper.modeling_whisper import sinusoids

from qwen2audio_train.config.schema import ConfigError, Dtype, ModelConfig, ModelKind
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.model.build import add_special_tokens, build_meta_model, build_model, parameter_counts
from tests.model.rows import tiny_config
from tests.model.test_assemble import tokenizer

PUBLISHED_7B = {
    "audio_config": {},
    "text_config": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 156032,
    },
}


def tiny(**changes: object) -> ModelConfig:
    config = tiny_config()
    names = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    audio = {name: getattr(config.audio_config, name) for name in names}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    text = {name: getattr(config.text_config, name) for name in names}
    architecture = {"audio_config": audio, "text_config": text}
    return ModelConfig(kind=ModelKind.tiny, architecture=architecture, **changes)


def test_parameters_of_the_published_architecture() -> None:
    model = build_meta_model(ModelConfig(kind=ModelKind.released, architecture=PUBLISHED_7B))
    millions = {part: round(count / 1e6, 1) for part, count in parameter_counts(model).items()}
    assert millions["audio_tower"] == 637.0
    assert millions["multi_modal_projector"] == 5.2
    assert millions["lm_head"] == 639.1
    assert millions["language_model"] + millions["embed_tokens"] == pytest.approx(7115.8)
    assert all(p.is_meta for p in model.parameters())


def test_a_tiny_model_takes_its_vocabulary_from_the_tokenizer() -> None:
    words = add_special_tokens(tokenizer(50))
    model = build_model(tiny(num_mel_bins=16), tokenizer=words)
    assert len(model.lm_head.weight) == len(model.get_input_embeddings().weight) == len(words) == 55
    assert model.config.audio_token_index == words.convert_tokens_to_ids(QWEN2_AUDIO.audio_token)
    assert model.config.text_config.eos_token_id == words.convert_tokens_to_ids(QWEN2_AUDIO.turn_end)
    assert model.model.audio_tower.conv1.in_channels == 16


def test_special_tokens_are_added_once() -> None:
    words = add_special_tokens(tokenizer(50))
    assert len(add_special_tokens(words)) == 55
    assert len(words.tokenize(f"w1 {QWEN2_AUDIO.audio_token}{QWEN2_AUDIO.audio_token} w2")) == 4


def test_positions_of_a_tiny_model_are_whispers_and_fixed() -> None:
    table = build_model(tiny(dtype=Dtype.bfloat16)).model.audio_tower.embed_positions.weight
    assert table.dtype is torch.bfloat16
    assert not table.requires_grad
    assert torch.equal(table, sinusoids(*table.shape).bfloat16())


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(tiny()).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_saved_weights_replace_those_of_the_kind(tmp_path: Path) -> None:
    model = build_model(tiny())
    model.save_pretrained(tmp_path)
    loaded = build_model(tiny(dtype=Dtype.bfloat16), str(tmp_path))
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())
    released = build_model(ModelConfig(kind=ModelKind.released, path=str(tmp_path)))
    assert torch.equal(released.lm_head.weight, model.lm_head.weight)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    build_model(tiny()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["language_model.lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing or of another shape, the first is lm_head\.weight"):
        build_model(tiny(), str(tmp_path))


def test_another_model_is_refused(tmp_path: Path) -> None:
    text = tiny().architecture["text_config"]
    Qwen2ForCausalLM(Qwen2Config(**text, vocab_size=20)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type qwen2, expected qwen2_audio"):
        build_model(tiny(), str(tmp_path))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    build_model(tiny(), tokenizer=add_special_tokens(tokenizer(50))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is token 42 of the tokenizer and 52 of the model"):
        build_model(tiny(), str(tmp_path), tokenizer=add_special_tokens(tokenizer(40)))


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (ModelConfig(kind=ModelKind.released), "model.path"),
        (ModelConfig(kind=ModelKind.assembled), "model.audio_encoder"),
        (ModelConfig(kind=ModelKind.assembled, audio_encoder="w"), "model.language_model"),
    ],
)
def test_a_missing_key_is_named(cfg: ModelConfig, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        build_model(cfg)


def test_unknown_numbers_of_an_architecture_are_refused() -> None:
    cfg = tiny()
    cfg.architecture["audio"] = {}
    with pytest.raises(ValueError, match=r"model\.architecture: unknown \['audio'\]"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (
            "hiden_size",
            64,
            r"text_config\.hiden_size: unknown key; did you mean .*\.text_config\.hidden_size\?",
        ),
        ("hidden_size", "wide", r"model\.architecture: .*'hidden_size' expected int, got str"),
        ("num_hidden_layers", -1, r"model\.architecture: .*num_hidden_layers"),
        ("model_type", "qwen7", r"text_config\.model_type: 'qwen7' is unknown to transformers"),
    ],
)
def test_wrong_numbers_of_an_architecture_are_refused(key: str, value: Any, says: str) -> None:
    cfg = tiny()
    cfg.architecture["text_config"][key] = value
    with pytest.raises(ConfigError, match=says):
        build_model(cfg)


def test_attention_dropout_is_refused() -> None:
    cfg = tiny()
    cfg.architecture["text_config"]["attention_dropout"] = 0.1
    with pytest.raises(ValueError, match=r"text_config\.attention_dropout is 0\.1"):
        build_model(cfg)
