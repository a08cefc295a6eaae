"""Kahneman-Tversky optimisation (arXiv:2402.01306): every answer by itself, desirable or not; pairs count as two.

`trl.KTOTrainer` computes the loss. It measures how far the policy has moved by answers that do not belong to their
prompt; these become further branches of the packed row, next to the answers that do.

Shape legend: R rows (answers) of a micro-batch, desirable first, T tokens of the longest answer plus one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from trl import KTOTrainer

from qwen2audio_train.config.preference import Reference
from qwen2audio_train.training.reference.reference import resolve_reference
from qwen2audio_train.training.trainers.preference import PreferenceTrainer

Batch = dict[str, Tensor]


class AudioKTOTrainer(PreferenceTrainer, KTOTrainer):
    """KTO on packed answers. The KL term is estimated from each forward by itself; with one prompt alone it is zero.

    Args:
        model, reference, ref_model, and the rest: see `PreferenceTrainer`; a stored reference is not supported.

    Raises:
        ConfigError: model, `reference` and `ref_model` do not go together.
    """

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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """As `PackedTrainer.get_batch_samples`; the weight of a step is its number of answers."""
        return super().get_batch_samples(map(self._unpaired, epoch_iterator), num_batches, device)

    def held_out(self) -> Iterable[Batch]:
        """The held-out batches, with every pair as two answers."""
        return map(self._unpaired, super().held_out())

    def _unpaired(self, batch: Batch) -> Batch:
        batch = unpaired(batch)
        return with_foreign_answers(batch) if self.calculate_KL else batch

    def _means(self, mode: str) -> dict[str, float]:
        """The margin is that of the means: the answers of a micro-batch may all be of one kind."""
        self._tallies[mode].pop("rewards/margins", None)
        means = super()._means(mode)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor | None:
        """TRL's, on the rows of the answers that do not belong."""
        foreign = {"scatter": batch["KL_scatter"]} if self.calculate_KL else {}
        found: Tensor | None = super()._compute_kl_logps(model, batch | foreign)
        return found


def unpaired(batch: Batch) -> Batch:
    """A batch of pairs as one of single answers: `label` (R,) bool and `pair_weight` (R,)."""
    if "label" in batch:
        return batch
    weight = batch["pair_weight"].repeat(2)
    return batch | {"label": torch.arange(len(weight)) < len(weight) // 2, "pair_weight": weight}


def with_foreign_answers(batch: Batch) -> Batch:
    """Add the rows `KL_...` (R, T'), one per row: its prompt, and as a branch of its own the answer to another prompt.

    The answer is that of the nearest row before it (round the end) that has another prompt, and empty without such one.
    """
    scatter, starts = batch["scatter"], batch["cu_q"].long()
    ends = scatter[:, 0]
    ids, positions = batch["packed_ids"][0], batch["packed_positions"][0]
    old_keys = batch.get("key_index", torch.arange(len(ids)))
    new_ids, new_positions, lengths, keys, places = [], [], [], [old_keys], []
    size = len(ids)
    for row, end in enumerate(ends.tolist()):
        answer = _foreign_answer(scatter, row)
        if not len(answer):
            places.append(ends[row : row + 1])
            continue
        trunk = torch.arange(int(starts[torch.searchsorted(starts, end, right=True) - 1]), end + 1)
        own = torch.arange(size, size + len(answer))
        size += len(answer)
        new_ids.append(ids[answer])
        new_positions.append(positions[end] + 1 + torch.arange(len(answer)))
        lengths.append((len(own), len(trunk) + len(own)))
        keys += [trunk, own]
        places.append(torch.cat([ends[row : row + 1], own]))
    kl_scatter = nn.utils.rnn.pad_sequence([*places, torch.full((2,), -1)], batch_first=True, padding_value=-1)[:-1]
    all_ids = torch.cat([ids, *new_ids])
    attended = kl_scatter >= 0
    completion = attended.long()
    completion[:, 0] = 0
    queries, attended_keys = torch.tensor(lengths, dtype=torch.long).view(-1, 2).unbind(1)
    return batch | {
        "packed_ids": all_ids[None],
        "packed_positions": torch.cat([positions, *new_positions])[None],
        "cu_q": _extended(batch["cu_q"], queries),
        "cu_k": _extended(batch["cu_k"], attended_keys),
        "key_index": torch.cat(keys),
        "KL_input_ids": torch.where(attended, all_ids[kl_scatter.clamp(min=0)], 0),
        "KL_attention_mask": attended.long(),
        "KL_completion_mask": completion,
        "KL_scatter": kl_scatter,
    }


def _foreign_answer(scatter: Tensor, row: int) -> Tensor:
    """Places of the answer of the nearest row before `row`, round the end, that has another prompt; else of none."""
    for step in range(1, len(scatter)):
        other = (row - step) % len(scatter)
        if scatter[other, 0] != scatter[row, 0]:
            return scatter[other, 1:][scatter[other, 1:] >= 0]
    return scatter[row, :0]


def _extended(borders: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([borders, (borders[-1] + lengths.cumsum(0)).to(borders.dtype)])
