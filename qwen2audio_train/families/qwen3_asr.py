"""Qwen3-ASR (arXiv:2601.21337): a tower that convolves second by second and looks 8 s far, under a Qwen3.

Source: transformers' classes and the configs of `Qwen/Qwen3-ASR-1.7B-hf` and `-0.6B-hf`, which share these lengths.
Clips over 30 s are heard in windows of 30 s as everywhere in this project; the stock tower takes them whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from qwen2audio_train.families.family import Family

CHUNK = 100
"""Mel frames that are convolved together (1 s), padded by themselves: `2 * n_window` of the encoder's config."""

CHUNK_TOKENS = 13
"""Tokens of a full chunk: 100 frames halved three times, rounded up."""

WINDOW_TOKENS = 8 * CHUNK_TOKENS
"""Tokens that attend to each other (8 s): `n_window_infer // (2 * n_window)` chunks."""


def num_audio_tokens(frames: int) -> int:
    """Audio tokens of a clip of `frames` mel frames: 13 a full second, and an eighth of the rest, rounded up."""
    chunks, rest = divmod(frames, CHUNK)
    return chunks * CHUNK_TOKENS + -(-rest // 8)


def mel_columns(frames: int) -> int:
    """Columns that a clip takes in a packed mel spectrogram: whole chunks."""
    return -(-frames // CHUNK) * CHUNK


def clip_index(clip_frames: Sequence[int]) -> dict[str, Any]:
    """What the tower has to know of packed clips: n tokens, W windows of attention.

    Returns:
        `clip_kept`: (n,) int64 outputs of the convolutions, 13 a chunk, that are tokens and no padding;
        `clip_cu`: (W + 1,) int32 borders of the windows among the tokens; `clip_longest`: tokens of the longest one.
    """
    counts = [num_audio_tokens(frames) for frames in clip_frames]
    starts = accumulate((mel_columns(frames) // CHUNK * CHUNK_TOKENS for frames in clip_frames), initial=0)
    windows = [min(WINDOW_TOKENS, count - at) for count in counts for at in range(0, count, WINDOW_TOKENS)]
    return {
        # A chunk that is not full is its clip's last one, so a clip's tokens lie end to end.
        "clip_kept": np.concatenate([start + np.arange(n) for start, n in zip(starts, counts, strict=False)]),
        "clip_cu": np.cumsum([0, *windows]).astype(np.int32),
        "clip_longest": max(windows),
    }


QWEN3_ASR = Family(
    name="qwen3_asr",
    audio_token="<|audio_pad|>",
    clip=("<|audio_start|>", "<|audio_end|>"),
    chat_clip=("<|audio_start|>", "<|audio_end|>"),
    system_prompt="",
    turn_head="<|im_start|>{role}\n",
    turn_end="<|im_end|>",
    turn_tail="\n",
    text_end="<|endoftext|>",
    special_tokens=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
    ),
    num_encoder_frames=num_audio_tokens,
    num_audio_tokens=num_audio_tokens,
    mel_columns=mel_columns,
    clip_index=clip_index,
    # Three convolutions of width 3 and stride 2 reach 1 + 2 + 4 frames beyond the one in their middle.
    lookahead_frames=7,
    model_class="Qwen3ASRForConditionalGeneration",
    processor_class="Qwen3ASRProcessor",
    extractor_class="Qwen3ASRFeatureExtractor",
    # By itself it hears a clip of under 0.5 s as one of 0.5 s.
    extractor_options={"min_length": 0},
    # Padded only to the longest clip of a batch, a clip's last frames would depend on the others.
    processor_options={"audio_kwargs": {"padding": "max_length"}},
    # Every content, a text or a list of parts, is printed the same way; the system message is there even when empty.
    chat_template=(
        "{%- macro say(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
        "{%- if part.type == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>{%- else -%}{{ part.text }}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
        "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\n<|im_end|>\\n' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{{ '<|im_start|>' + message.role + '\\n' + say(message.content) + '<|im_end|>\\n' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    sub_configs={"audio_config": "qwen3_asr_encoder", "text_config": "qwen3"},
    audio_token_key="audio_token_id",
    published_names={},
    parts={
        "audio_tower": "model.audio_tower",
        "multi_modal_projector": "model.multi_modal_projector",
        "language_model": "model.language_model",
        "embed_tokens": "model.language_model.embed_tokens",
        "lm_head": "lm_head",
    },
    fixed=(),
    encoder_layer=r"\baudio_tower\.(?:.*\.)?layers\.(\d+)\.",
    encoder_stem=r"\.conv(?:2d[123]|_out)\.",
    adapter_targets={
        "language_model": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        "audio_tower": r"model\.audio_tower\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|fc1|fc2)",
        "multi_modal_projector": r"model\.multi_modal_projector\.linear_[12]",
    },
    blocks=("Qwen3ASRAudioEncoderLayer", "Qwen3DecoderLayer"),
)
