"""Kahneman-Tversky optimisation (arXiv:2402.01306) on the pairs of DPO: every answer by itself, good or bad.

`trl.KTOTrainer` computes the loss. It measures how far the policy has moved by answers that do not belong to their
prompt; these become further branches of the packed row, next to the pair's own answers.

Shape legend: B pairs of a micro-batch, R = 2 B rows (chosen first), T tokens of the longest answer plus one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from trl import KTOTrainer

from qwen2audio_train.config import ConfigError, Reference
from qwen2audio_train.training.preference_seams import PreferenceSeams
from qwen2audio_train.training.reference import resolve_reference

Batch = dict[str, Tensor]


class AudioKTOTrainer(PreferenceSeams, KTOTrainer):
    """KTO on packed pairs. The KL term is estimated from each forward by itself, so a forward needs two prompts.

    Args:
        model, reference, ref_model, and the rest: see `PreferenceSeams`; a stored reference is not supported.

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

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: Any) -> tuple[list, Any]:
        """As `PackedSeams.get_batch_samples`, with every pair as two answers."""
        batches, pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
        return [unpaired(batch) for batch in batches], pairs

    def held_out(self) -> Iterable[Batch]:
        """The held-out batches, with every pair as two answers."""
        return map(unpaired, super().held_out())

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Tensor | None:
        """TRL's, on the rows of the answers that do not belong."""
        found: Tensor | None = super()._compute_kl_logps(model, batch | {"scatter": batch["KL_scatter"]})
        return found


def unpaired(batch: Batch) -> Batch:
    """A batch of pairs as TRL's unpaired one: `label` (R,) bool, and the rows `KL_...` (R, T') of foreign answers.

    Each row's prompt gets the answer of the nearest row before it that has another prompt, as a branch of its own.

    Raises:
        ConfigError: all rows have the same prompt.
    """
    scatter, starts = batch["scatter"], batch["cu_q"].long()
    ends = scatter[:, 0]
    ids, positions = batch["packed_ids"][0], batch["packed_positions"][0]
    rows = len(scatter)
    old_keys = batch.get("key_index", torch.arange(len(ids)))
    new_ids, new_positions, lengths, keys, places = [], [], [], [old_keys], []
    size = len(ids)
    for row in range(rows):
        other = _foreign(ends, row, real=bool(batch["pair_weight"].any()))
        answer = scatter[other, 1:][scatter[other, 1:] >= 0]
        end = int(ends[row])
        trunk = torch.arange(int(starts[torch.searchsorted(starts, end, right=True) - 1]), end + 1)
        own = torch.arange(size, size + len(answer))
        size += len(answer)
        new_ids.append(ids[answer])
        new_positions.append(positions[end] + 1 + torch.arange(len(answer)))
        lengths.append(len(answer))
        keys += [trunk, own]
        places.append(torch.cat([ends[row : row + 1], own]))
    kl_scatter = nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)
    all_ids = torch.cat([ids, *new_ids])
    attended = kl_scatter >= 0
    completion = attended.long()
    completion[:, 0] = 0
    key_lengths = torch.tensor([len(trunk) + len(own) for trunk, own in zip(keys[1::2], keys[2::2], strict=True)])
    return batch | {
        "packed_ids": all_ids[None],
        "packed_positions": torch.cat([positions, *new_positions])[None],
        "cu_q": _extended(batch["cu_q"], torch.tensor(lengths)),
        "cu_k": _extended(batch["cu_k"], key_lengths),
        "key_index": torch.cat(keys),
        "label": torch.arange(rows) < rows // 2,
        "KL_input_ids": torch.where(attended, all_ids[kl_scatter.clamp(min=0)], 0),
        "KL_attention_mask": attended.long(),
        "KL_completion_mask": completion,
        "KL_scatter": kl_scatter,
    }


def _foreign(ends: Tensor, row: int, *, real: bool) -> int:
    """The nearest row before `row` (round the end) with another prompt; in a filler any row does."""
    for step in range(1, len(ends)):
        other = (row - step) % len(ends)
        if ends[other] != ends[row] or not real:
            return other
    raise ConfigError("KTO needs answers to other prompts in every forward: set data.samples_per_pack to 2 or more")


def _extended(borders: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([borders, (borders[-1] + lengths.cumsum(0)).to(borders.dtype)])
