"""What of a recipe is about preferences."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qwen2audio_train.config.bounds import at_least


class Reference(StrEnum):
    auto = "auto"
    adapter = "adapter"
    frozen = "frozen"
    cached = "cached"


class Objective(StrEnum):
    dpo = "dpo"
    kto = "kto"


@dataclass
class PreferenceConfig:
    """What stage three optimises, what it measures the policy against, and when it stops.

    Attributes:
        objective: `dpo` compares the answers of a pair; `kto` takes each by itself as good or bad.
        reference: `auto` is the disabled adapter under LoRA and a frozen copy otherwise; `cached` computes the
            reference's log-probabilities once, before training, and keeps no reference in memory.
        cache_dir: folder of the log-probabilities.
        probe_examples: so many held-out pairs are also decoded, and heard with the wrong audio, at every evaluation.
        watch: held-out figure, such as `eval_rewards/accuracies`, that stops training when it no longer improves.
        watch_lower: the lower the better, as of `eval_decoded/wer/...`.
        patience: evaluations without improvement after which training stops; 0 never stops.
    """

    objective: Objective = Objective.dpo
    reference: Reference = Reference.auto
    cache_dir: str = "data_cache/reference"
    probe_examples: int = at_least(0, 0)
    watch: str = "eval_rewards/accuracies"
    watch_lower: bool = False
    patience: int = at_least(0, 0)
