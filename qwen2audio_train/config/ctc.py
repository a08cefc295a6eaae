"""What of a recipe is about reading audio embeddings as tokens (connectionist temporal classification)."""

from __future__ import annotations

from dataclasses import dataclass

from qwen2audio_train.config.bounds import at_least


@dataclass
class CtcConfig:
    """Audio embeddings read as tokens of the language model.

    Attributes:
        sampled_tokens: so many tokens of the vocabulary, drawn anew at each step, stand for all that are not in the
            transcripts; 0 takes them all, in chunks.
        weight: factor on its loss per token of a transcript beside that of the language model, in the stages pretrain
            and sft; 0 leaves it out. The stage encoder has no other loss.
    """

    sampled_tokens: int = at_least(0, 8192)
    weight: float = at_least(0, 0.0)
