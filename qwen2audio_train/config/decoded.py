"""What a stage decodes and scores while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen2audio_train.config.bounds import at_least


@dataclass
class DecodedConfig:
    """Held-out examples that every evaluation of pre-training or fine-tuning (`trainer.eval_strategy`) decodes.

    The scores are logged as `eval_decoded/METRIC/SOURCE`, such as `eval_decoded/wer/librispeech_dev_clean`, and may be
    `trainer.metric_for_best_model`; texts and scores are in `decoded/step-*` of the run folder, which
    `launch/report.py` reads.

    Attributes:
        manifests: held-out manifest per name; a source that is called as a benchmark is scored by its rules.
        max_examples: so many of each source, evenly from all of it; 0 takes all.
        budget_s: seconds that decoding may take; the first evaluation measures how many examples fit, and later ones
            take the same. 0 sets no bound.
        max_new_tokens: longest answer in tokens.
        tokens_per_batch: prompt and answer tokens of a batch while decoding.
        shown: so many answers are shown in Weights & Biases, with their audio.
    """

    manifests: dict[str, str] = field(default_factory=dict)
    max_examples: int = at_least(0, 64)
    budget_s: float = at_least(0, 0.0)
    max_new_tokens: int = at_least(1, 128)
    tokens_per_batch: int = at_least(1, 8192)
    shown: int = at_least(0, 8)


def decoded_refusal(config: DecodedConfig, stage: str, eval_strategy: str | bool) -> str | None:
    """Why these cannot be decoded; None when they can."""
    if not config.manifests:
        return None
    if stage not in ("pretrain", "sft"):
        return f"decoded.manifests and stage={stage}: only pretrain and sft decode them; see preference.probe_examples"
    if eval_strategy in ("no", False):
        return "decoded.manifests: nothing is evaluated; set trainer.eval_strategy=steps"
    return None
