"""A small random model, its tokenizer and prompts on random audio."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import ModelConfig, ModelKind
from qwen2audio_train.data.examples import ChatExample, Clip, Message, TaskExample
from qwen2audio_train.data.prompts.render import render
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer
from qwen2audio_train.data.samples.sample import Sample, build_sample
from qwen2audio_train.evaluation.decoding.generate import stop_ids
from qwen2audio_train.model.build import build_model
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio

MEL_BINS = 16
SAMPLES = SampleRecipe(num_mel_bins=MEL_BINS)
ARCHITECTURE = {
    "audio_config": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48},
    "text_config": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    },
}


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    texts = ["the cat sat on the mat", "what is said in this recording", "detect the language and recognize"]
    return train_tokenizer(texts, 300, ["<|en|>", "<|de|>"])


def tiny_model(seed: int = 0, spread: float = 6.0) -> PackedQwen2Audio:
    """Random weights times `spread`, so that the best token is clear of the second."""
    torch.manual_seed(seed)
    cfg = ModelConfig(kind=ModelKind.tiny, num_mel_bins=MEL_BINS, architecture=ARCHITECTURE)
    model = build_model(cfg, tokenizer=tiny_tokenizer()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed_positions" not in name:
                weight.mul_(spread)
    return model


def ending_model() -> PackedQwen2Audio:
    """Ends some answers early: the head leans towards the stop tokens."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[stop_ids(tiny_tokenizer())] *= 1.6
    return model


def noise(rng: np.random.Generator, seconds: float) -> np.ndarray:
    return (0.1 * rng.standard_normal(round(16_000 * seconds))).astype(np.float32)


def task_sample(name: str, seconds: float, seed: int = 0) -> Sample:
    example = TaskExample(name, Clip("", seconds), "asr", "en", "", "noise")
    waveform = noise(np.random.default_rng(seed), seconds)
    return build_sample(render(example, for_generation=True), [waveform], tiny_tokenizer(), SAMPLES)


def chat_sample(name: str, seconds: tuple[float, ...], question: str, seed: int = 0) -> Sample:
    clips = tuple(Clip("", s) for s in seconds)
    example = ChatExample(name, (Message("user", (*clips, question)),), "noise")
    rng = np.random.default_rng(seed)
    waveforms = [noise(rng, s) for s in seconds]
    return build_sample(render(example, for_generation=True), waveforms, tiny_tokenizer(), SAMPLES)


def mixed_samples() -> list[Sample]:
    """Prompts of unlike length: one clip, two clips, text alone."""
    samples = [task_sample(f"task{i}", 0.1 + 0.37 * i, seed=i) for i in range(6)]
    samples.append(chat_sample("two", (0.5, 1.1), "What is said in both?", seed=50))
    samples.append(chat_sample("text", (), "What is the cat on?"))
    return samples
