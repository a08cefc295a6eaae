"""A Qwen2-Audio model out of a Whisper encoder and a Qwen language model, with a new projector between them."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
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

    The vocabulary grows to the tokenizer's; a head tied to the embeddings becomes a copy of them, since Qwen2-Audio's
    own head is never tied. The projector is new and random.

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
    if len(tokenizer) > lm.config.vocab_size:
        lm.resize_token_embeddings(len(tokenizer))
    model = PackedQwen2Audio(_joint_config(whisper.config, lm, tokenizer)).to(dtype)  # type: ignore[arg-type]
    model.model.audio_tower.load_state_dict(whisper.encoder.state_dict())
    model.model.language_model.load_state_dict(lm.base_model.state_dict())
    head = lm.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        model.lm_head.weight.copy_(head.weight)
    model.generation_config = copy.deepcopy(lm.generation_config)
    return model


def _joint_config(whisper: WhisperConfig, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Qwen2AudioConfig:
    """Config of the joint model."""
    audio = {name: getattr(whisper, name) for name in ENCODER_FIELDS}
    text = lm.config.to_dict() | {"tie_word_embeddings": False}
    audio_token_index = cast(int, tokenizer.convert_tokens_to_ids(QWEN2_AUDIO.audio_token))
    return Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=audio_token_index)
