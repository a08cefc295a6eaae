"""Parts that a model is assembled from, tiny and random: a Whisper model, and language models of several layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperModel,
)

VOCAB = 64
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
}


def write_whisper(folder: Path, bands: int = 80) -> WhisperModel:
    """A saved Whisper model of two encoder layers."""
    torch.manual_seed(0)
    config = WhisperConfig(
        num_mel_bins=bands,
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_layers=1,
        decoder_attention_heads=3,
        decoder_ffn_dim=40,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = WhisperModel(config)
    model.save_pretrained(folder)
    return model.eval()


def write_language_model(
    folder: Path, family: str, tokenizer: PreTrainedTokenizerBase | None = None, *, tied: bool = True
) -> nn.Module:
    """A saved language model of two layers, with the tokenizer beside it that sizes its vocabulary."""
    torch.manual_seed(1)
    size = {**TEXT, "tie_word_embeddings": tied} | ({"vocab_size": len(tokenizer)} if tokenizer is not None else {})
    model: nn.Module
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**size))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**size))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**size, head_dim=16))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return model.eval()
