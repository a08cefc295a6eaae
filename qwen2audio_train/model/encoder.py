"""Qwen2-Audio's tower over packed clips: every clip at its own length, no padding to 30 s.

Shape legend: A encoder windows ("clips" here), F mel columns in the slot layout of `mel_columns`, d tower width,
E frames after the convolutions over all clips, n audio tokens over all clips.

Exact with regard to the stock encoder on a window padded to 30 s: the two mel frames after the end of a clip are part
of its slot, and the columns outside a clip are set to zero between the convolutions, which is what the second one's own
padding does at the borders of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2AudioEncoder

from qwen2audio_train.families.qwen2_audio import mel_columns, num_audio_tokens, num_encoder_frames


class ClipIndex(NamedTuple):
    """Where things lie in a packed spectrogram."""

    outside: Tensor  # (F,) bool: columns after frame L of their clip
    frames: Tensor  # (E,) columns (of F / 2) that survive the second convolution
    positions: Tensor  # (E,) frame number within the clip
    cu: Tensor  # (A + 1,) int32 borders of clips in E
    longest: int  # frames of the longest clip
    pooled: Tensor  # (2 n,) frames of E that meet the average pooling


def clip_index(clip_frames: Tensor) -> ClipIndex:
    """Index tensors of clips of `clip_frames` (A,) mel frames, on that tensor's device."""
    mel = clip_frames.tolist()
    columns = torch.tensor([mel_columns(f) for f in mel])
    kept = torch.tensor(mel) + 1
    lengths = torch.tensor([num_encoder_frames(f) for f in mel])
    used = torch.tensor([2 * num_audio_tokens(f) for f in mel])
    outside = torch.tensor([False, True]).repeat(len(mel))
    starts, first = columns.cumsum(0) - columns, lengths.cumsum(0) - lengths
    positions = _ranges(lengths)
    device = clip_frames.device
    return ClipIndex(
        outside=outside.repeat_interleave(torch.stack([kept, columns - kept], dim=1).flatten()).to(device),
        frames=(positions + (starts // 2).repeat_interleave(lengths)).to(device),
        positions=positions.to(device),
        cu=F.pad(lengths.cumsum(0), (1, 0)).int().to(device),
        longest=max(lengths.tolist()),
        pooled=(_ranges(used) + first.repeat_interleave(used)).to(device),
    )


def _ranges(lengths: Tensor) -> Tensor:
    """0 .. length - 1 for every length, end to end."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)


def encode_packed(tower: Qwen2AudioEncoder, mel: Tensor, clip_frames: Tensor) -> Tensor:
    """Audio embeddings of packed clips.

    Only sub-modules of `tower` are called, so that ZeRO-3 gathers their weights.

    Args:
        tower: its config has to ask for packed attention.
        mel: (num_mel_bins, F) float, clips in slot layout.
        clip_frames: (A,) mel frames of each clip, A > 0.

    Returns:
        (n, d), clips in their order.

    Raises:
        ValueError: the spectrogram's width is not that of the clips.
    """
    frames = encode_frames(tower, mel, clip_frames)
    out: Tensor = tower.layer_norm(tower.avg_pooler(frames.transpose(0, 1)).transpose(0, 1))
    return out


def encode_frames(tower: Qwen2AudioEncoder, mel: Tensor, clip_frames: Tensor) -> Tensor:
    """The frames (2 n, d) that `encode_packed` pools in pairs: 50 a second, before the final norm."""
    index = clip_index(clip_frames)
    if mel.size(-1) != len(index.outside):
        raise ValueError(
            f"mel has {mel.size(-1)} columns, clip_frames {clip_frames.tolist()} need {len(index.outside)}; "
            "lay every clip out in mel_columns(frames) columns"
        )
    hidden = mel.unsqueeze(0).to(tower.conv1.weight.dtype)
    hidden = F.gelu(tower.conv1(hidden)).masked_fill(index.outside, 0.0)
    hidden = F.gelu(tower.conv2(hidden))
    hidden = hidden[0].transpose(0, 1)[index.frames] + tower.embed_positions(index.positions)
    hidden = F.dropout(hidden, p=tower.dropout, training=tower.training).unsqueeze(0)
    segments = {"cu_q": index.cu, "cu_k": index.cu, "max_q": index.longest, "max_k": index.longest}
    for layer in tower.layers:
        if tower.training and tower.layerdrop > 0.0 and torch.rand([]) < tower.layerdrop:
            continue
        hidden = layer(hidden, None, **segments)
    return hidden[0][index.pooled]
