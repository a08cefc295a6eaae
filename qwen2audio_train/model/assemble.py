"""A Qwen2-Audio model out of a Whisper encoder and a Qwen language model, with a new projector between them."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2AudioConfig,
    WhisperConfig,
    WhisperModel,
)

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio

ENCODER_FIELDS = (
    "num_mel_bins",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "encoder_layerdrop",
    "d_model",
    "dropout",
    "attention_dropout",
    "activation_function",
    "activation_dropout",
    "scale_embedding",
    "max_source_positions",
)


def assemble(
    audio_encoder: str, language_model: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PackedQwen2Audio:
    """Join the encoder of a Whisper model and a causal language model.

    The vocabulary grows to the tokenizer's (see `grow_vocabulary`); a head tied to the embeddings becomes a copy of
    them, since Qwen2-Audio's own head is never tied. The projector is new and random.

    Args:
        audio_encoder, language_model: hub ids or folders.
        tokenizer: the language model's, with the audio tokens added.

    Raises:
        ConfigError: the first is no Whisper model.
    """
    whisper = WhisperModel.from_pretrained(audio_encoder, dtype=dtype)
    if not isinstance(whisper.config, WhisperConfig) or whisper.config.max_source_positions != 1500:
        raise ConfigError(f"model.audio_encoder: {audio_encoder} is no Whisper model with windows of 30 s")
    lm = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
    grow_vocabulary(lm, tokenizer, _own_tokenizer(language_model))
    model = PackedQwen2Audio(_joint_config(whisper.config, lm, tokenizer)).to(dtype)  # type: ignore[arg-type]
    model.model.audio_tower.load_state_dict(whisper.encoder.state_dict())
    model.model.language_model.load_state_dict(lm.base_model.state_dict())
    head = lm.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        model.lm_head.weight.copy_(head.weight)
    model.generation_config = copy.deepcopy(lm.generation_config)
    return model


@torch.no_grad()
def grow_vocabulary(
    lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: PreTrainedTokenizerBase | None
) -> None:
    """Rows of embeddings and head for the tokens of `tokenizer` that `known`, the model's own, has not.

    A new token's row is the mean of the rows of the pieces that its name was written with before: tags differ from the
    first step on, also where the language model is frozen, and neighbouring times begin as neighbours. Without `known`
    it is the mean of all old rows. Old rows stay as they are.
    """
    old = lm.config.vocab_size
    first = old if known is None else len(known)
    if len(tokenizer) > old:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = {number: token for token, number in tokenizer.get_added_vocab().items() if number >= first}
    pieces = [[] if known is None else known(token, add_special_tokens=False)["input_ids"] for token in new.values()]
    layers: list[Any] = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    for table in {id(layer.weight): layer.weight for layer in layers}.values():
        mean = table[: min(old, first)].float().mean(0)
        rows = [table[ids].float().mean(0) if ids else mean for ids in pieces]
        if rows:
            table[list(new)] = torch.stack(rows).to(table.dtype)


def _own_tokenizer(language_model: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the language model came with; None where there is none beside it."""
    try:
        known: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(language_model)
    except (OSError, ValueError, TypeError):
        return None
    return known if len(known) > len(known.get_added_vocab()) else None  # a config alone may give an empty one


def _joint_config(whisper: WhisperConfig, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Qwen2AudioConfig:
    """Config of the joint model."""
    audio = {name: getattr(whisper, name) for name in ENCODER_FIELDS}
    text = lm.config.to_dict() | {"tie_word_embeddings": False}
    audio_token_index = cast(int, tokenizer.convert_tokens_to_ids(QWEN2_AUDIO.audio_token))
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=audio_token_index)
