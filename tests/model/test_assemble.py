"""A model joined from a Whisper encoder and a Qwen language model gives back what its parts gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qwen2audio_train.config.schema import ModelConfig, ModelKind
from qwen2audio_train.data.prompts.tokenizer import of_family, train_tokenizer
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.model.build import add_special_tokens, build_model
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import slot
from tests.tiny_parts import TEXT, VOCAB, write_language_model, write_whisper


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    vocab = {f"w{i}": i for i in range(words - 1)} | {"<|endoftext|>": words - 1}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def recipe(folder: Path) -> ModelConfig:
    return ModelConfig(
        kind=ModelKind.assembled, audio_encoder=str(folder / "whisper"), language_model=str(folder / "lm")
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_assembled_model_equals_its_parts(tmp_path: Path, family: str, tied: bool) -> None:
    encoder = write_whisper(tmp_path / "whisper").encoder
    lm = write_language_model(tmp_path / "lm", family, tied=tied)
    words = add_special_tokens(tokenizer(VOCAB))
    model = build_model(recipe(tmp_path), tokenizer=words).eval()

    ids = torch.arange(20)[None] % VOCAB
    with torch.no_grad():
        want = lm(input_ids=ids).logits
        got = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(got[..., :VOCAB], want, atol=1e-6)

    mel = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = encoder(mel).last_hidden_state
        pooled = encoder.layer_norm  # Whisper norms before the pooling would come, Qwen2-Audio after it
        stock = Qwen2AudioForConditionalGeneration.from_pretrained(_saved(model, tmp_path / "joint")).model.audio_tower
        expected = stock(mel).last_hidden_state[0]
        got = model.model.encode(slot(mel[0], 3000), torch.tensor([3000]))
        assert torch.allclose(got, model.model.multi_modal_projector(expected), atol=1e-5)
        unpooled = _without_last_norm(encoder, mel)
        assert torch.allclose(pooled(unpooled), hidden, atol=1e-6)
        average = unpooled[0].view(750, 2, -1).mean(1)
        assert torch.allclose(encoder.layer_norm(average), expected, atol=1e-5)


def _saved(model: PackedQwen2Audio, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def _without_last_norm(encoder: nn.Module, mel: torch.Tensor) -> torch.Tensor:
    """Whisper's hidden states in front of its last norm."""
    caught = []
    handle = encoder.layer_norm.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    encoder(mel)
    handle.remove()
    return caught[0]


def test_vocabulary_grows_by_the_audio_tokens_and_no_old_row_changes(tmp_path: Path) -> None:
    write_whisper(tmp_path / "whisper")
    lm = write_language_model(tmp_path / "lm", "qwen2", tied=True)
    words = add_special_tokens(tokenizer(VOCAB))
    model = build_model(recipe(tmp_path), tokenizer=words)
    assert len(words) == VOCAB + len(QWEN2_AUDIO.special_tokens) - 1
    embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert len(embedding) == len(head) == len(words)
    assert model.config.audio_token_index == words.convert_tokens_to_ids(QWEN2_AUDIO.audio_token)
    assert torch.equal(embedding[:VOCAB], lm.get_input_embeddings().weight)
    assert torch.equal(head, embedding)
    assert head.data_ptr() != embedding.data_ptr()
    assert not model.config.text_config.tie_word_embeddings


def test_a_new_row_is_the_mean_of_the_pieces_of_its_name(tmp_path: Path) -> None:
    write_whisper(tmp_path / "whisper")
    own = train_tokenizer(["weather"], 300)
    lm = write_language_model(tmp_path / "lm", "llama", own, tied=False)
    tags = ["<|transcribe|>", "<|0.32|>", "<|0.33|>"]
    grown = of_family(train_tokenizer(["weather"], 300), QWEN2_AUDIO, tags[:1], tags[1:])
    model = build_model(recipe(tmp_path), tokenizer=grown)
    for old, new in (
        (lm.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (lm.get_output_embeddings().weight, model.lm_head.weight),
    ):
        assert torch.equal(new[: len(own)], old)
        assert len(new) == len(own) + 3
        for number, tag in enumerate(tags, start=len(own)):
            pieces = own(tag, add_special_tokens=False)["input_ids"]
            assert len(pieces) > 5
            assert torch.allclose(new[number], old[pieces].mean(0), atol=1e-7)
        assert not torch.equal(new[-1], new[-2])


def test_padded_vocabulary_is_kept_where_the_tokenizer_fits_into_it(tmp_path: Path) -> None:
    write_whisper(tmp_path / "whisper")
    write_language_model(tmp_path / "lm", "qwen2", tied=False)
    model = build_model(recipe(tmp_path), tokenizer=add_special_tokens(tokenizer(VOCAB - 10)))
    assert len(model.lm_head.weight) == VOCAB


def test_weights_of_an_assembled_model_are_resumed_without_its_parts(tmp_path: Path) -> None:
    write_whisper(tmp_path / "whisper", bands=128)
    write_language_model(tmp_path / "lm", "qwen3", tied=True)
    words = add_special_tokens(tokenizer(VOCAB))
    model = build_model(recipe(tmp_path), tokenizer=words)
    again = build_model(ModelConfig(kind=ModelKind.assembled), str(_saved(model, tmp_path / "joint")))
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    write_whisper(tmp_path / "whisper")
    config = Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match="sliding-window layers"):
        build_model(recipe(tmp_path), tokenizer=add_special_tokens(tokenizer(VOCAB)))
