"""An audio tower learning to listen by itself: connectionist temporal classification over its frames.

Qwen2-Audio's encoder starts from Whisper's and its language model from Qwen's. A tower of random numbers has no such
start, and a language model cannot learn to align with what is noise to it; this gives it one. The objective is that of
Graves et al. 2006 over the tokens of the transcript (bytes, with a tokenizer of bytes), 50 frames a second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.errors import UserError
from qwen2audio_train.families.qwen2_audio import num_audio_tokens
from qwen2audio_train.model.encoder import clip_index_of, encode_frames
from qwen2audio_train.model.packed import PackedAudioLM
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio


class Recogniser(nn.Module):
    """The tower of `audio` under a linear head; nothing else of `audio` is run or trained.

    Args:
        vocab_size: number of tokens; the blank comes after them.
        special_ids: tokens that are no part of a transcript.
    """

    spoken: Tensor

    def __init__(self, audio: PackedAudioLM, vocab_size: int, special_ids: list[int]) -> None:
        if not isinstance(audio, PackedQwen2Audio):
            known = PackedQwen2Audio.family.name
            raise ConfigError(f"model.family={audio.family.name}: the stage encoder reads the frames of {known} alone")
        super().__init__()
        width = audio.model.audio_tower.layer_norm.normalized_shape[0]
        self.audio = audio
        self.lm_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocab_size + 1))
        self.blank = vocab_size
        spoken = torch.ones(vocab_size, dtype=torch.bool)
        spoken[special_ids] = False
        self.register_buffer("spoken", spoken, persistent=False)
        audio.requires_grad_(False)
        tower = audio.model.audio_tower
        tower.requires_grad_(True)
        tower.embed_positions.requires_grad_(False)
        # It normalises what the language model reads; the head reads the frames before it.
        tower.layer_norm.requires_grad_(False)

    def forward(
        self, *, mel: Tensor, clip_frames: Tensor, cu_q: Tensor, predict_from: Tensor, target: Tensor, **batch: Any
    ) -> Tensor:
        """Sum of the losses of a packed batch whose samples have one clip of at most 30 s each.

        Returns:
            () float32; zero for a filler. A transcript longer than its frames can hold counts as zero.

        Raises:
            UserError: a sample has no clip, several, or one of more than 30 s.
        """
        if len(clip_frames) == 0:
            return 0.0 * sum((p.sum() for p in self.parameters() if p.requires_grad), mel.new_zeros(()))
        if len(clip_frames) != len(cu_q) - 1:
            raise UserError(
                f"data: {len(cu_q) - 1} examples with {len(clip_frames)} encoder windows in a batch; a random tower "
                "learns from examples of one clip of at most 30 s; set data.long_audio=reject to leave longer ones out"
            )
        frames = encode_frames(self.audio.model.audio_tower, mel, clip_frames, clip_index_of(batch))
        log_probs = self.lm_head(frames).float().log_softmax(-1)
        lengths = [2 * num_audio_tokens(count) for count in clip_frames.tolist()]
        spoken = self.spoken[target]
        segment = torch.searchsorted(cu_q.long(), predict_from, right=True) - 1
        counts = torch.bincount(segment[spoken], minlength=len(clip_frames))
        return F.ctc_loss(
            pad_sequence(log_probs.split(lengths)),
            target[spoken],
            torch.tensor(lengths),
            counts.cpu(),
            blank=self.blank,
            reduction="sum",
            zero_infinity=True,
        )
