"""Qwen2-Audio's tower over packed clips: every clip at its own length, no padding to 30 s.

Shape legend: A encoder windows ("clips" here), F mel columns in the slot layout of `mel_columns`, d tower width,
E frames after the convolutions over all clips, n audio tokens over all clips.

Exact with regard to the stock encoder on a window padded to 30 s: the two mel frames after the end of a clip are part
of its slot, and the columns outside a clip are set to zero between the convolutions, which is what the second one's own
padding does at the borders of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2AudioEncoder

from qwen2audio_train.families.qwen2_audio import clip_index

Clips = Mapping[str, Any]
"""Index tensors of packed clips by their names in a batch, which begin with `clip_`."""


class ClipIndex(NamedTuple):
    """Where packed clips lie in their spectrogram: `families.qwen2_audio.clip_index` as tensors."""

    outside: Tensor  # (F,) bool: columns after frame L of their clip
    columns: Tensor  # (E,) columns (of F / 2) that survive the second convolution
    positions: Tensor  # (E,) frame number within the clip
    cu: Tensor  # (A + 1,) int32 borders of clips in E
    longest: int  # frames of the longest clip
    pooled: Tensor  # (2 n,) frames of E that meet the average pooling

    @classmethod
    def of(cls, clip_frames: Tensor, batch: Clips | None) -> ClipIndex:
        """That of a batch, or else made of the clips' frames (A,), for which the host waits for the device."""
        if batch is None:
            batch = index_on(clip_index, clip_frames)
        return cls(*(batch[f"clip_{name}"] for name in cls._fields))


def index_on(made_by: Callable[[Sequence[int]], Clips], clip_frames: Tensor) -> Clips:
    """`Family.clip_index` of clips of so many frames (A,), its arrays as tensors where these are."""
    return {
        name: torch.from_numpy(value).to(clip_frames.device) if isinstance(value, np.ndarray) else value
        for name, value in made_by(clip_frames.tolist()).items()
    }


def encode_packed(tower: Qwen2AudioEncoder, mel: Tensor, clip_frames: Tensor, index: Clips | None = None) -> Tensor:
    """Audio embeddings of packed clips.

    Only sub-modules of `tower` are called, so that ZeRO-3 gathers their weights.

    Args:
        tower: its config has to ask for packed attention.
        mel: (num_mel_bins, F) float, clips in slot layout.
        clip_frames: (A,) mel frames of each clip, A > 0.
        index: `Family.clip_index` of these clips, as tensors on the device of `mel`.

    Returns:
        (n, d), clips in their order.

    Raises:
        ValueError: the spectrogram's width is not that of the clips.
    """
    frames = encode_frames(tower, mel, clip_frames, index)
    out: Tensor = tower.layer_norm(tower.avg_pooler(frames.transpose(0, 1)).transpose(0, 1))
    return out


def encode_frames(tower: Qwen2AudioEncoder, mel: Tensor, clip_frames: Tensor, index: Clips | None = None) -> Tensor:
    """The frames (2 n, d) that `encode_packed` pools in pairs: 50 a second, before the final norm."""
    clips = ClipIndex.of(clip_frames, index)
    if mel.size(-1) != len(clips.outside):
        raise ValueError(
            f"mel has {mel.size(-1)} columns, clip_frames {clip_frames.tolist()} need {len(clips.outside)}; "
            "lay every clip out in mel_columns(frames) columns"
        )
    hidden = mel.unsqueeze(0).to(tower.conv1.weight.dtype)
    hidden = F.gelu(tower.conv1(hidden)).masked_fill(clips.outside, 0.0)
    hidden = F.gelu(tower.conv2(hidden))
    hidden = hidden[0].transpose(0, 1)[clips.columns] + tower.embed_positions(clips.positions)
    hidden = F.dropout(hidden, p=tower.dropout, training=tower.training).unsqueeze(0)
    segments = {"cu_q": clips.cu, "cu_k": clips.cu, "max_q": clips.longest, "max_k": clips.longest}
    for layer in tower.layers:
        if tower.training and tower.layerdrop > 0.0 and torch.rand([]) < tower.layerdrop:
            continue
        hidden = layer(hidden, None, **segments)
    return hidden[0][clips.pooled]


def clip_index_of(batch: Mapping[str, Any]) -> Clips | None:
    """What a batch says of its clips; None where it has been laid out without."""
    return {name: value for name, value in batch.items() if name.startswith("clip_")} or None
