"""Qwen3-ASR on packed batches: transformers' classes with those of `packed` in front.

Shape legend: F mel columns in whole chunks of 100, C chunks, n audio tokens, d tower width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3ASRForConditionalGeneration, Qwen3ASRModel

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.families.qwen3_asr import CHUNK, CHUNK_TOKENS, QWEN3_ASR, WINDOW_TOKENS, clip_index
from qwen2audio_train.model.encoder import Clips, index_on
from qwen2audio_train.model.packed import PackedAudioLM, PackedBackbone

BLOCKS = list(QWEN3_ASR.blocks)


class PackedQwen3ASRModel(PackedBackbone, Qwen3ASRModel):
    """Qwen3-ASR without LM head.

    Raises:
        ConfigError: the tower has other chunks or windows of attention than the published ones.
    """

    family = QWEN3_ASR
    _no_split_modules = BLOCKS

    def __init__(self, config: Any) -> None:
        audio = config.audio_config
        found, expected = (audio.n_window, audio.n_window_infer), (CHUNK // 2, WINDOW_TOKENS // CHUNK_TOKENS * CHUNK)
        if found != expected:
            raise ConfigError(f"audio_config: n_window, n_window_infer are {found}, packed clips need {expected}")
        super().__init__(config)

    def listen(self, mel: Tensor, clip_frames: Tensor, index: Clips | None = None) -> Tensor:
        """(n, d). A window of attention is a segment; the stock layers are told of one segment, which is not cut."""
        tower: Any = self.audio_tower
        clips = index_on(clip_index, clip_frames) if index is None else index
        hidden = mel.to(tower.conv_out.weight.dtype).unflatten(1, (-1, CHUNK)).transpose(0, 1).unsqueeze(1)
        for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
            hidden = F.gelu(convolution(hidden))
        hidden = tower.conv_out(hidden.permute(0, 3, 1, 2).flatten(2))  # (C, 13, d)
        hidden = hidden + tower.positional_embedding(CHUNK_TOKENS).to(hidden.dtype)
        hidden = hidden.flatten(0, 1)[clips["clip_kept"]]
        whole = torch.tensor([0, len(hidden)])  # on the host, where the stock layers read it
        cu, longest = clips["clip_cu"], clips["clip_longest"]
        segments = {"cu_q": cu, "cu_k": cu, "max_q": longest, "max_k": longest}
        for layer in tower.layers:
            (hidden,) = layer(hidden, whole, **segments)
        return cast(Tensor, tower.ln_post(hidden))

    def project(self, audio: Tensor) -> Tensor:
        return cast(Tensor, self.multi_modal_projector(audio))


class PackedQwen3ASR(PackedAudioLM, Qwen3ASRForConditionalGeneration):
    """Qwen3-ASR with LM head."""

    family = QWEN3_ASR
    backbone = PackedQwen3ASRModel
    _no_split_modules = BLOCKS
