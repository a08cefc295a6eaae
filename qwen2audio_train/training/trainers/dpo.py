"""Direct preference optimisation of audio models: `trl.DPOTrainer` on tree-packed pairs.

TRL's loss code runs unchanged. A batch holds its `input_ids`, `attention_mask` and `completion_mask` (2 B, T), chosen
rows first, each row the prompt's last token and the answer; the row that the model really runs (every clip encoded
once, every prompt computed once) travels beside them and comes back as (2 B, T, d).

Shape legend: B pairs of a micro-batch, T tokens of the longest answer plus one.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from trl import DPOTrainer
from typing_extensions import override

from qwen2audio_train.batch import PreferenceBatch
from qwen2audio_train.config.preference import Reference
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.reference.cache import ReferenceCache, ReferenceCacheError
from qwen2audio_train.training.reference.reference import check_stored, resolve_reference
from qwen2audio_train.training.trainers.preference import PreferenceTrainer, without_own_keys


class AudioDPOTrainer(PreferenceTrainer, DPOTrainer):
    """DPO on packed pairs, with every loss, divergence and metric of TRL.

    Args:
        model: the policy, a `PackedAudioLM` or a PEFT model around one.
        reference: where the reference's log-probabilities come from. `adapter`: the policy without its adapter, or, if
            the adapter is not fresh, with a frozen copy of it as it is now; `frozen`: `ref_model`; `cached`: `cache`
            alone; `auto`: `adapter` for a PEFT model without `ref_model`, else `frozen`.
        ref_model: the frozen copy.
        cache: store of reference log-probabilities; where a live reference is at hand it is filled as pairs come by.
        args, probes, and the rest: see `PreferenceTrainer`.

    Raises:
        ValueError: model, `reference`, `ref_model` and `cache` do not go together.
    """

    held_out_metrics = ("rewards/accuracies", "mean_token_accuracy")

    def __init__(
        self,
        model: Any,
        *,
        reference: Reference = Reference.auto,
        ref_model: nn.Module | None = None,
        cache: ReferenceCache | None = None,
        **kwargs: Any,
    ) -> None:
        reference = resolve_reference(reference, model, ref_model, cache)
        self.cache = cache
        self._cache_checked = False
        super().__init__(model, reference=reference, ref_model=ref_model, **kwargs)
        self.precompute_ref_logps = cache is not None

    @override
    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As `PreferenceTrainer.compute_loss`, with the reference from the store where there is one.

        Raises:
            ConfigError: there are unpaired answers in the batch.
        """
        if "label" in inputs:
            raise ConfigError("DPO compares pairs, and there are unpaired answers: use preference.objective=kto")
        if self.cache is not None:
            inputs = inputs | self._reference_logps(self.cache, model, cast(PreferenceBatch, inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def precompute_reference(self, batches: Iterable[PreferenceBatch]) -> int:
        """Fill the store from `batches` of this rank before training; every rank gives equally many.

        The reference is the live one, or else the policy itself, which before its first step is its own reference.

        Returns:
            The number of pairs that this rank now finds in the store; other ranks' are found by `cache.load()`.
        """
        if self.cache is None or self.state.global_step > 0:
            raise ValueError("precompute_reference needs a trainer with a cache, before its first step")
        with nullcontext(self.ref_model) if self.ref_model else self._inference_model() as model:
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                _, found = self.cache.lookup(inputs["pair_key"])
                if self._any_rank_lacks(found, inputs):
                    self._store(self.cache, inputs, found, self._recompute(model, inputs))
        self.cache.close()
        return len(self.cache)

    def _reference_logps(self, cache: ReferenceCache, model: Any, inputs: PreferenceBatch) -> dict[str, Tensor]:
        """`ref_chosen_logps` and `ref_rejected_logps` (B,) from the store, or computed and stored."""
        logps, found = cache.lookup(inputs["pair_key"])
        live = self.ref_model or (model if self._adapter_is_reference else None)
        if self._any_rank_lacks(found, inputs):
            if live is None:
                raise ReferenceCacheError(
                    f"{cache.folder} lacks {int((~found).sum())} of the {len(found)} pairs of a batch "
                    f"({cache.num_damaged} records are damaged): fill it over the whole data before training, or "
                    "use reference=frozen"
                )
            logps = self._recompute(live, inputs)
            self._store(cache, inputs, found, logps)
        elif not self._cache_checked and (live is not None or self.state.global_step == 0):
            dtype = torch.bfloat16 if self.args.bf16 else self.model.dtype
            check_stored(logps, self._recompute(live or model, inputs), _real(inputs), dtype, cache)
        self._cache_checked = True
        chosen, rejected = logps.to(self.args.device).unbind(1)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _recompute(self, model: Any, inputs: PreferenceBatch) -> Tensor:
        """Reference log-probabilities (B, 2) float32 on the CPU."""
        return torch.stack(self.compute_ref_log_probs(model, without_own_keys(inputs)), dim=1).float().cpu()

    def _store(self, cache: ReferenceCache, inputs: PreferenceBatch, found: Tensor, logps: Tensor) -> None:
        new = ~found & _real(inputs)
        if new.any():
            cache.store(inputs["pair_key"].cpu()[new], logps[new])

    def _any_rank_lacks(self, found: Tensor, inputs: PreferenceBatch) -> bool:
        """Whether any rank misses a pair: under ZeRO-3 all have to run the reference, or none."""
        lacks = not bool((found | ~_real(inputs)).all())
        return bool(self.sum_over_ranks(torch.tensor([float(lacks)])) > 0)


def _real(inputs: PreferenceBatch) -> Tensor:
    """(B,) bool on the CPU: false for the dummy pair of a filler."""
    real: Tensor = inputs["pair_weight"].cpu() > 0
    return real
