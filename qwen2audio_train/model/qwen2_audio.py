"""Qwen2-Audio on packed batches: transformers' classes with those of `packed` in front."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import Qwen2AudioForConditionalGeneration, Qwen2AudioModel
from transformers.models.whisper.modeling_whisper import sinusoids

from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.model.encoder import Clips, encode_packed
from qwen2audio_train.model.packed import PackedAudioLM, PackedBackbone

BLOCKS = list(QWEN2_AUDIO.blocks)


class PackedQwen2AudioModel(PackedBackbone, Qwen2AudioModel):
    """Qwen2-Audio without LM head."""

    family = QWEN2_AUDIO
    _no_split_modules = BLOCKS

    def listen(self, mel: Tensor, clip_frames: Tensor, index: Clips | None = None) -> Tensor:
        return encode_packed(self.audio_tower, mel, clip_frames, index)

    def project(self, audio: Tensor) -> Tensor:
        return cast(Tensor, self.multi_modal_projector(audio))


class PackedQwen2Audio(PackedAudioLM, Qwen2AudioForConditionalGeneration):
    """Qwen2-Audio with LM head."""

    family = QWEN2_AUDIO
    backbone = PackedQwen2AudioModel
    _no_split_modules = BLOCKS

    def set_fixed_weights(self) -> None:
        """Give the encoder Whisper's fixed positions: built from a config they are random numbers."""
        table = self.model.audio_tower.embed_positions.weight
        with torch.no_grad():
            table.copy_(sinusoids(*table.shape))
