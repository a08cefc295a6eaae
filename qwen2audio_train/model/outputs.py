"""What a packed forward gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class PackedOutput(ModelOutput):
    """What a packed training batch gives back.

    Attributes:
        nll_sum: () float32, differentiable: sum of weight x nll.
        weight_sum: () float32: sum of the weights.
        nll: (M,) float32, detached.
        correct: (M,) bool: the label is the most likely token.
        ctc_sum: () float32, differentiable: sum of the losses of the transcripts, where the model has a `ctc_head`.
        audio_norms: (2,) float32: sum of the norms of the audio embeddings, and their number.
        read: per clip the token ids that its audio embeddings say, in evaluation.

    The last two only where the language model is not run.
    """

    nll_sum: Tensor | None = None
    weight_sum: Tensor | None = None
    nll: Tensor | None = None
    correct: Tensor | None = None
    ctc_sum: Tensor | None = None
    audio_norms: Tensor | None = None
    read: list[Tensor] | None = None


@dataclass
class PackedHidden(BaseModelOutputWithPast):
    """Hidden states of a packed row; `audio` (n, d) are the audio embeddings in it, or those of a dummy clip."""

    audio: Tensor | None = None
