"""Kahneman-Tversky optimisation (arXiv:2402.01306): every answer by itself, desirable or not; pairs count as two.

`trl.KTOTrainer` computes the loss. It measures how far the policy has moved by answers that do not belong to their
prompt; these are further branches of the packed row, next to the answers that do (`data/samples/collate_kto.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from trl import KTOTrainer
from typing_extensions import override

from qwen2audio_train.batch import UnpairedBatch
from qwen2audio_train.config.preference import Reference
from qwen2audio_train.training.reference.reference import resolve_reference
from qwen2audio_train.training.trainers.preference import PreferenceTrainer


class AudioKTOTrainer(PreferenceTrainer, KTOTrainer):
    """KTO on packed answers. The KL term is estimated from each forward by itself; with one prompt alone it is zero.

    Args:
        model, reference, ref_model, and the rest: see `PreferenceTrainer`; a stored reference is not supported.

    Raises:
        ConfigError: model, `reference` and `ref_model` do not go together.
    """

    held_out_metrics = ("kl",)

    def __init__(
        self,
        model: Any,
        *,
        reference: Reference = Reference.auto,
        ref_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        reference = resolve_reference(reference, model, ref_model, None)
        super().__init__(model, reference=reference, ref_model=ref_model, **kwargs)

    def _means(self, mode: str) -> dict[str, float]:
        """The margin is that of the means: the answers of a micro-batch may all be of one kind."""
        self._tallies[mode].pop("rewards/margins", None)
        means = super()._means(mode)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    @override
    def _compute_kl_logps(self, model: Any, batch: UnpairedBatch) -> Tensor | None:
        """TRL's, on the rows of the answers that do not belong."""
        foreign = {"scatter": batch["KL_scatter"]} if self.calculate_KL else {}
        found: Tensor | None = super()._compute_kl_logps(model, batch | foreign)
        return found
