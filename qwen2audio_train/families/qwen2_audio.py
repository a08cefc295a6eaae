"""Qwen2-Audio (arXiv:2407.10759): Whisper's encoder, pooled to 40 ms, under a Qwen language model with ChatML.

Source: the published checkpoints `Qwen/Qwen2-Audio-7B` and `-Instruct`, and transformers' classes for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen2audio_train.families.family import Family


def num_encoder_frames(frames: int) -> int:
    """Frames after the second convolution (20 ms each) of a clip of `frames` mel frames."""
    return (frames - 1) // 2 + 1


def num_audio_tokens(frames: int) -> int:
    """Audio tokens (40 ms each) of a clip of `frames` mel frames; a trailing odd encoder frame is dropped."""
    return (num_encoder_frames(frames) - 2) // 2 + 1


def mel_columns(frames: int) -> int:
    """Columns that a clip of `frames` mel frames takes in a packed mel spectrogram.

    The clip's frames are followed by the two frames that the convolutions see beyond its end (zeros from frame 3 000
    on, where the stock encoder's own zero padding begins) and by one zero column that stands for the padding before
    the next clip. The total is even, so that every clip starts on the stride of the second convolution.
    """
    return (frames + 4) // 2 * 2


def clip_index(clip_frames: Sequence[int]) -> dict[str, Any]:
    """Where clips of so many mel frames lie in a packed spectrogram of F columns: see `model.encoder.ClipIndex`."""
    frames = np.array(clip_frames)
    columns, lengths, tokens = (
        np.array([length(f) for f in clip_frames]) for length in (mel_columns, num_encoder_frames, num_audio_tokens)
    )
    within_and_after = np.stack([frames + 1, columns - frames - 1], axis=1).ravel()
    positions = _ranges(lengths)
    return {
        "clip_outside": np.repeat(np.tile([False, True], len(frames)), within_and_after),
        "clip_columns": positions + np.repeat(_starts(columns) // 2, lengths),
        "clip_positions": positions,
        "clip_cu": np.cumsum([0, *lengths]).astype(np.int32),
        "clip_longest": int(lengths.max()),
        "clip_pooled": _ranges(2 * tokens) + np.repeat(_starts(lengths), 2 * tokens),
    }


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _ranges(lengths: np.ndarray) -> np.ndarray:
    """0 .. length - 1 for every length, end to end."""
    return np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)


QWEN2_AUDIO = Family(
    name="qwen2_audio",
    audio_token="<|AUDIO|>",
    clip=("<|audio_bos|>", "<|audio_eos|>"),
    chat_clip=("Audio {number}: <|audio_bos|>", "<|audio_eos|>\n"),
    system_prompt="You are a helpful assistant.",
    turn_head="<|im_start|>{role}\n",
    turn_end="<|im_end|>",
    turn_tail="\n",
    text_end="<|endoftext|>",
    # Their ids are 151643 to 151648 in this order.
    special_tokens=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    ),
    num_encoder_frames=num_encoder_frames,
    num_audio_tokens=num_audio_tokens,
    mel_columns=mel_columns,
    clip_index=clip_index,
    lookahead_frames=2,
    model_class="Qwen2AudioForConditionalGeneration",
    processor_class="Qwen2AudioProcessor",
    sub_configs={"audio_config": "qwen2_audio_encoder", "text_config": "qwen2"},
    audio_token_key="audio_token_index",
    # The published names are those of transformers 4.
    published_names={
        r"^language_model.lm_head": "lm_head",
        r"^language_model.model": "model.language_model",
        r"^audio_tower": "model.audio_tower",
        r"^multi_modal_projector": "model.multi_modal_projector",
    },
    parts={
        "audio_tower": "model.audio_tower",
        "multi_modal_projector": "model.multi_modal_projector",
        "language_model": "model.language_model",
        "embed_tokens": "model.language_model.embed_tokens",
        "lm_head": "lm_head",
    },
    fixed=("embed_positions.weight",),  # Whisper's sinusoids
    encoder_layer=r"\baudio_tower\.(?:.*\.)?layers\.(\d+)\.",
    encoder_stem=r"\.conv[12]\.",
    adapter_targets={
        "language_model": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        "audio_tower": r"model\.audio_tower\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|fc1|fc2)",
        "multi_modal_projector": r"model\.multi_modal_projector\.linear",
    },
    # Its language model may be any that transformers builds from `text_config.model_type`; these were tried.
    blocks=("Qwen2AudioEncoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "LlamaDecoderLayer"),
)
