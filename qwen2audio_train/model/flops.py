"""Floating-point operations of a packed batch, from the architecture's numbers alone, and what devices can do.

A matrix product of (m, k) and (k, n) counts 2 m k n. Attention counts the pairs that the causal mask leaves. Norms,
activations and the softmax are left out, as is usual. Backward counts one forward for the gradients of the inputs and
one for those of the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedConfig

from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT, family_of


class EncoderShape(Protocol):
    """What plans read of the encoder's config, under Whisper's names."""

    num_mel_bins: int
    d_model: int
    encoder_layers: int
    encoder_ffn_dim: int


class DecoderShape(Protocol):
    """What plans read of the language model's config, under Qwen2's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


ORDER = ("audio_tower", "multi_modal_projector", "language_model", "lm_head")
"""The parts that compute, in the order of the forward pass."""

PEAK_BF16_FLOPS = {"A100-80": 312e12, "H100": 989.4e12, "H200": 989.4e12, "L40S": 362.05e12}
"""Dense bfloat16 operations per second on tensor cores, without sparsity: NVIDIA's data sheets of the SXM modules and
of the L40S. Well-tuned large products reach about four fifths of it."""

SXM_NAMES = {
    "A100-SXM4-40GB": "A100-80",
    "A100-SXM4-80GB": "A100-80",
    "A100 80GB PCIe": "A100-80",
    "H100 80GB HBM3": "H100",
    "H200": "H200",
    "L40S": "L40S",
}
"""What torch calls devices, after `NVIDIA `. Cards of the same generation in other forms (PCIe, NVL) are slower."""


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 operations per second of a device by torch's name for it; None for one that is not known."""
    known = SXM_NAMES.get(device_name.removeprefix("NVIDIA "))
    return None if known is None else PEAK_BF16_FLOPS[known]


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


def encoder_flops(audio: EncoderShape, frames: int, family: Family = DEFAULT) -> int:
    """Forward operations of the audio tower on one clip of `frames` mel frames.

    Args:
        audio: the encoder's config, with the fields of Whisper's.
    """
    d, steps = audio.d_model, family.num_encoder_frames(frames)
    convolutions = 2 * 3 * d * (audio.num_mel_bins * frames + d * steps)
    linear = steps * (8 * d * d + 4 * d * audio.encoder_ffn_dim)
    attention = 4 * steps * steps * d
    return int(convolutions + audio.encoder_layers * (linear + attention))


def token_flops(text: DecoderShape) -> int:
    """Forward operations of the language model's linear layers on one token, the LM head not among them.

    Args:
        text: a `Qwen2Config` or `Qwen3Config`.
    """
    d, width = text.hidden_size, head_dim(text)
    queries, keys = text.num_attention_heads * width, text.num_key_value_heads * width
    return int(text.num_hidden_layers * 2 * (2 * d * queries + 2 * d * keys + 3 * d * text.intermediate_size))


def head_dim(text: DecoderShape) -> int:
    """Width of an attention head of the language model."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def forward_flops(config: PreTrainedConfig, load: Load) -> dict[str, int]:
    """Forward operations of each part on a packed load: clips at their length, labels alone at the head."""
    audio: EncoderShape = config.audio_config
    text: DecoderShape = config.text_config
    family = family_of(config.model_type)
    audio_tokens = sum(family.num_audio_tokens(f) for f in load.clip_frames)
    per_pair = 4 * text.num_attention_heads * head_dim(text) * text.num_hidden_layers
    return {
        "audio_tower": sum(encoder_flops(audio, f, family) for f in load.clip_frames),
        "multi_modal_projector": 2 * audio.d_model * text.hidden_size * audio_tokens,
        "language_model": load.tokens * token_flops(text) + load.pairs * per_pair,
        "lm_head": 2 * text.hidden_size * text.vocab_size * load.labels,
    }


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
