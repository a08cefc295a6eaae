"""Audio embeddings read as tokens: connectionist temporal classification against the language model's own embeddings.

A new projector is listened through only late: the language model has no reason to attend to what means nothing yet.
Here the projector (and the encoder with it) learns to speak in the language model's embeddings first. The score of a
token at a frame is the product of the audio embedding with the token's row of the embedding table, which stays as it
is; with a blank beside them this is the objective of Graves et al. 2006. The language model is not run.

Relatives: LegoSLM (arXiv:2505.11352) has an encoder emit CTC posteriors over a language model's vocabulary and weights
its embeddings by them; CTC is also used to compress the frames in front of a language model.

The softmax is over the whole vocabulary and never held whole: transcripts need the scores of their own tokens alone,
and all others are one more class, the logarithm of their summed exponentials, which is taken in chunks. A sample of the
others stands for all of them, corrected by its share.

Shape legend: n audio tokens (frames) over all clips, A clips, t tokens of all transcripts, U different ones, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from qwen2audio_train.model.loss import LOGIT_BYTES

Embed = Callable[[Tensor], Tensor]
"""Token ids (k,) -> their embeddings (k, d). A call of the module, so that ZeRO-3 gathers its weight."""

HEAD = "ctc_head."
"""What the names of its weights begin with."""

HEAD_FILE = "ctc_head.safetensors"
"""What the head is called beside the weights of a checkpoint; transformers' Qwen2-Audio has no place for it."""


class CtcHead(nn.Module):
    """Loss of transcripts given audio embeddings.

    Args:
        width: of the embeddings.
        vocabulary: (V,) int64 ids of the tokens that can be said: no special ones, no rows without a token.
    """

    vocabulary: Tensor

    def __init__(self, width: int, vocabulary: Tensor) -> None:
        super().__init__()
        self.blank = nn.Parameter(torch.zeros(width))
        self.blank_bias = nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("vocabulary", vocabulary, persistent=False)

    def forward(
        self,
        audio: Tensor,
        lengths: Sequence[int],
        transcript: Tensor,
        transcript_length: Tensor,
        embed: Embed,
        others: Tensor | None = None,
    ) -> Tensor:
        """Sum over clips of -log P(transcript | audio).

        Args:
            audio: (n, d), clips end to end, `lengths` tokens each.
            transcript: (t,) transcripts end to end; `transcript_length` (A,) tokens each, 0 for a clip without one.
            others: (k,) ids out of `vocabulary` that stand for all of it in the softmax (tokens of the transcripts are
                looked after separately); None: all of it.

        Returns:
            () float32. A transcript that its frames cannot hold counts as zero.
        """
        if len(transcript) == 0:
            return 0.0 * sum((p.float().sum() for p in self.parameters()), audio.float().sum())
        wanted = transcript_length > 0
        frames = audio[wanted.repeat_interleave(torch.tensor(lengths, device=audio.device))]
        counts = [length for length, has_text in zip(lengths, wanted.tolist(), strict=True) if has_text]
        used, labels = transcript.unique(return_inverse=True)
        log_probs = self.log_probs(frames, used, embed, others)
        return F.ctc_loss(
            pad_sequence(list(log_probs.split(counts))),
            labels + 1,
            torch.tensor(counts),
            transcript_length[wanted].cpu(),
            reduction="sum",
            zero_infinity=True,
        )

    def log_probs(self, frames: Tensor, used: Tensor, embed: Embed, others: Tensor | None) -> Tensor:
        """Log-probabilities (n, 1 + U + 1) float32 of the blank, of the tokens `used` (U,) and of any other one."""
        columns = [self._blank_score(frames).unsqueeze(1), self._scores(frames, used, embed)]
        rest = self.vocabulary if others is None else others
        rest = rest[torch.isin(rest, used, invert=True)]
        if len(rest):
            share = int(torch.isin(self.vocabulary, used, invert=True).sum()) / len(rest)
            log_sum = cast(Tensor, _LogSum.apply(frames, self.scale, rest, embed))
            columns.append(log_sum.unsqueeze(1) + math.log(share))
        return torch.cat(columns, dim=1).log_softmax(dim=1)

    def draw(self, count: int, seed: int) -> Tensor | None:
        """`count` different tokens of the vocabulary by a seed, the same on every rank; None where that is all."""
        if not 0 < count < len(self.vocabulary):
            return None
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.vocabulary), generator=generator)[:count]
        return self.vocabulary[chosen.to(self.vocabulary.device)]

    @torch.no_grad()
    def read(self, audio: Tensor, lengths: Sequence[int], embed: Embed) -> list[Tensor]:
        """Token ids of every clip: the likeliest at each frame, repetitions and then blanks taken out."""
        best = self._blank_score(audio)
        ids = torch.full_like(best, -1, dtype=torch.int64)
        for tokens in self.vocabulary.split(_chunk_tokens(len(audio))):
            score, place = self._scores(audio, tokens, embed).max(dim=1)
            ids = torch.where(score > best, tokens[place], ids)
            best = torch.maximum(best, score)
        clips = [clip.unique_consecutive() for clip in ids[: sum(lengths)].split(list(lengths))] if lengths else []
        return [clip[clip >= 0] for clip in clips]

    def _blank_score(self, frames: Tensor) -> Tensor:
        return (frames @ self.blank.to(frames.dtype)).float() + self.blank_bias.float()

    def _scores(self, frames: Tensor, tokens: Tensor, embed: Embed) -> Tensor:
        """Scores (n, k) float32 of some tokens; the table is read, never trained."""
        with torch.no_grad():
            rows = embed(tokens).to(frames.dtype)
        return (frames @ rows.t()).float() * self.scale.float()


class _LogSum(torch.autograd.Function):
    """log sum_k exp(scale x . e_k) over tokens k for every frame x, and for backward the expectation of e_k.

    That expectation (n, d) is all that the gradients need, so scores are neither kept nor computed twice.
    """

    @staticmethod
    def forward(ctx: Any, frames: Tensor, scale: Tensor, tokens: Tensor, embed: Embed) -> Tensor:
        total = frames.new_full((len(frames),), -math.inf, dtype=torch.float32)
        mean = torch.zeros_like(frames, dtype=torch.float32)
        for chunk in tokens.split(_chunk_tokens(len(frames))):
            rows = embed(chunk).to(frames.dtype)
            scores = (frames @ rows.t()).float().mul_(scale.float())
            top = scores.amax(dim=1)
            exps = scores.sub_(top.unsqueeze(1)).exp_()
            before, total = total, torch.logaddexp(total, top + exps.sum(dim=1).log())
            mean *= (before - total).exp().unsqueeze(1)
            mean += (exps.to(rows.dtype) @ rows).float() * (top - total).exp().unsqueeze(1)
        ctx.save_for_backward(frames, scale, mean)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        frames, scale, mean = ctx.saved_tensors
        by_frames = (grad * scale.float()).unsqueeze(1) * mean
        by_scale = (grad * (frames.float() * mean).sum(dim=1)).sum(dim=0, keepdim=True)
        return by_frames.to(frames.dtype), by_scale.to(scale.dtype), None, None


def _chunk_tokens(frames: int) -> int:
    """Tokens whose float32 scores at so many frames fit `LOGIT_BYTES`."""
    return max(1, LOGIT_BYTES // (4 * max(1, frames)))
