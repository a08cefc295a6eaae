"""What a step costs: floating-point operations, time and traffic, from the architecture's numbers alone.

A matrix product of (m, k) and (k, n) counts 2 m k n. Norms, activations and the softmax are left out, as is usual.
Backward counts one forward for the gradients of the inputs and one for those of the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from qwen2audio_train.errors import UserError
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT, family_of
from qwen2audio_train.layout import MAX_FRAMES, num_frames, num_samples_of, window_samples

ORDER = ("audio_tower", "multi_modal_projector", "language_model", "lm_head")
"""The parts that compute, in the order of the forward pass."""

PEAK_BF16_FLOPS = {"A100-80": 312e12, "H100": 989.4e12, "H200": 989.4e12, "L40S": 362.05e12}
"""Dense bfloat16 operations per second on tensor cores, without sparsity: NVIDIA's data sheets of the SXM modules and
of the L40S. Well-tuned large products reach about four fifths of it."""

MEMORY_BYTES = {"A100-80": 80e9, "H100": 80e9, "H200": 141e9, "L40S": 48e9}
"""Memory of the same GPUs, from the same data sheets."""


@dataclass(frozen=True)
class Load:
    """What goes through the model in one pass.

    Attributes:
        clip_frames: mel frames of each encoder window.
        tokens: tokens of the row, audio tokens among them.
        pairs: query-key pairs that the causal attention scores.
        labels: tokens that carry a label.
    """

    clip_frames: tuple[int, ...]
    tokens: int
    pairs: int
    labels: int

    @property
    def audio_s(self) -> float:
        """Seconds of audio."""
        return sum(self.clip_frames) / 100


def packed_load(clip_frames: Sequence[int], segment_lengths: Sequence[int], labels: int) -> Load:
    """The load of a packed row without trees, from the lengths of its clips and segments."""
    pairs = sum(n * (n + 1) // 2 for n in segment_lengths)
    return Load(tuple(clip_frames), sum(segment_lengths), pairs, labels)


def sample_load(
    clip_s: float, label_tokens: int, prompt_tokens: int, answers: int = 1, family: Family = DEFAULT
) -> Load:
    """The load of one sample with a single clip, of as many windows as it needs.

    Args:
        label_tokens: of each answer; several answers share the clip and the prompt, as the branches of a tree.
    """
    frames = [num_frames(n) for n in window_samples(num_samples_of(clip_s))] if clip_s else []
    trunk = sum(family.num_audio_tokens(f) for f in frames) + prompt_tokens
    if answers == 1:
        return packed_load(frames, [trunk + label_tokens], label_tokens)
    pairs = trunk * (trunk + 1) // 2 + answers * (label_tokens * trunk + label_tokens * (label_tokens + 1) // 2)
    return Load(tuple(frames), trunk + answers * label_tokens, pairs, answers * label_tokens)


def repeated(load: Load, times: int) -> Load:
    """`times` such samples in one row."""
    return Load(load.clip_frames * times, load.tokens * times, load.pairs * times, load.labels * times)


def encoder_flops(audio: Any, frames: int, family: Family = DEFAULT) -> int:
    """Forward operations of the audio tower on one clip of `frames` mel frames.

    Args:
        audio: the encoder's config, with the fields of Whisper's.
    """
    d, steps = audio.d_model, family.num_encoder_frames(frames)
    convolutions = 2 * 3 * d * (audio.num_mel_bins * frames + d * steps)
    linear = steps * (8 * d * d + 4 * d * audio.encoder_ffn_dim)
    attention = 4 * steps * steps * d
    return int(convolutions + audio.encoder_layers * (linear + attention))


def token_flops(text: Any) -> int:
    """Forward operations of the language model's linear layers on one token, the LM head not among them.

    Args:
        text: a `Qwen2Config` or `Qwen3Config`.
    """
    d, width = text.hidden_size, head_dim(text)
    queries, keys = text.num_attention_heads * width, text.num_key_value_heads * width
    return int(text.num_hidden_layers * 2 * (2 * d * queries + 2 * d * keys + 3 * d * text.intermediate_size))


def head_dim(text: Any) -> int:
    """Width of an attention head of the language model."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def forward_flops(config: PreTrainedConfig, load: Load) -> dict[str, int]:
    """Forward operations of each part on a packed load: clips at their length, labels alone at the head."""
    audio: Any = config.audio_config
    text: Any = config.text_config
    family = family_of(config.model_type)
    audio_tokens = sum(family.num_audio_tokens(f) for f in load.clip_frames)
    per_pair = 4 * text.num_attention_heads * head_dim(text) * text.num_hidden_layers
    return {
        "audio_tower": sum(encoder_flops(audio, f, family) for f in load.clip_frames),
        "multi_modal_projector": 2 * audio.d_model * text.hidden_size * audio_tokens,
        "language_model": load.tokens * token_flops(text) + load.pairs * per_pair,
        "lm_head": 2 * text.hidden_size * text.vocab_size * load.labels,
    }


def padded_forward_flops(config: PreTrainedConfig, load: Load) -> dict[str, int]:
    """The same load through the stock model: clips padded to 30 s, every token at the head, no padded rows."""
    flops = forward_flops(config, load)
    text: Any = config.text_config
    flops["audio_tower"] = len(load.clip_frames) * encoder_flops(
        config.audio_config, MAX_FRAMES, family_of(config.model_type)
    )
    flops["lm_head"] = 2 * text.hidden_size * text.vocab_size * load.tokens
    return flops


def training_flops(
    config: PreTrainedConfig,
    load: Load,
    *,
    trained: Collection[str] = ORDER,
    adapted: Collection[str] = (),
    checkpointed: Collection[str] = (),
) -> dict[str, int]:
    """Forward and backward operations of each part.

    Args:
        trained: parts whose weights are trained; `embed_tokens` counts as lying in front of the language model.
        adapted: parts with low-rank adapters, whose own operations (a percent or two) are left out.
        checkpointed: parts whose forward is repeated in backward.
    """
    total, reached = {}, False
    for part, forward in forward_flops(config, load).items():
        reached |= part in trained or part in adapted or (part == "language_model" and "embed_tokens" in trained)
        passes = 1 + reached + (part in trained) + (reached and part in checkpointed)
        total[part] = forward * passes
    return total


@dataclass(frozen=True)
class Throughput:
    """What a machine does with a load, per second of wall time and all GPUs together."""

    step_s: float
    tokens_per_s: float
    audio_hours_per_hour: float
    price_per_audio_hour: float


def throughput(
    load: Load, flops: float, *, gpu: str, utilisation: float, gpus: int = 1, gpu_hour_price: float = 0.0
) -> Throughput:
    """Speed at a given share of the peak.

    Args:
        load, flops: of one pass on one GPU; every GPU runs one like it.
        gpu: a key of `PEAK_BF16_FLOPS`.
        utilisation: share of the data sheet's peak that `flops` reach, in (0, 1]. It is the MFU where `flops` are the
            useful operations alone, without those that checkpointing repeats.
        gpu_hour_price: in any currency.

    Raises:
        ValueError: an unknown GPU, or a share outside of (0, 1].
    """
    if gpu not in PEAK_BF16_FLOPS:
        raise UserError(f"gpu {gpu} is unknown; known are {', '.join(PEAK_BF16_FLOPS)}")
    if not 0 < utilisation <= 1:
        raise UserError(f"utilisation is {utilisation}, expected a share in (0, 1]")
    step_s = flops / (PEAK_BF16_FLOPS[gpu] * utilisation)
    audio_rate = load.audio_s * gpus / step_s
    return Throughput(
        step_s=step_s,
        tokens_per_s=load.tokens * gpus / step_s,
        audio_hours_per_hour=audio_rate,
        price_per_audio_hour=gpu_hour_price * gpus / audio_rate if audio_rate else 0.0,
    )


def traffic_bytes(parameters: int, stage: int, micro_steps: int, bytes_per_value: int = 2) -> int:
    """Bytes that each rank sends in one optimiser step under a ZeRO stage, for many ranks.

    Stages 0 and 1 reduce and gather once per step. Stage 2 reduces at every micro-step and gathers once. Stage 3
    gathers for forward and for backward and reduces, at every micro-step.

    Args:
        parameters: trained ones for stages 0 to 2, all for stage 3.
    """
    passes = {0: 2, 1: 2, 2: micro_steps + 1, 3: 3 * micro_steps}
    return parameters * bytes_per_value * passes[stage]
