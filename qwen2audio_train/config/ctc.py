"""What of a recipe is about reading audio embeddings as tokens (connectionist temporal classification)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qwen2audio_train.config.bounds import at_least


@dataclass
class CtcConfig:
    """Audio embeddings read as tokens of the language model.

    Attributes:
        sampled_tokens: so many tokens of the vocabulary, drawn anew at each step, stand for all that are not in the
            transcripts; 0 takes them all, in chunks.
        weight: factor on its loss per token of a transcript beside that of the language model, in the stages pretrain
            and sft, without adapter and ZeRO-3; 0 leaves it out. The stage encoder has no other loss.
    """

    sampled_tokens: int = at_least(0, 8192)
    weight: float = at_least(0, 0.0)


def ctc_refusal(ctc: CtcConfig, stage: str, choice: Mapping[str, str], projector_frozen: bool) -> str | None:
    """Why `ctc.weight` would do nothing, or nothing right, in a recipe; `choice` as in the table of combinations."""
    reasons = {
        "is for the stages pretrain and sft": stage not in ("pretrain", "sft"),
        "trains the projector as a whole; set adapter.kind=none": choice["adapter"] != "none",
        "trains the projector; set model.freeze.multi_modal_projector=false": projector_frozen,
        # A rank whose pack has no transcript would not gather the embeddings that another one waits for.
        "has no support for ZeRO-3; set deepspeed.stage=2": choice["zero"] == "3",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    return f"ctc.weight={ctc.weight}: it {'; it '.join(found)}; or set ctc.weight=0" if found and ctc.weight else None
