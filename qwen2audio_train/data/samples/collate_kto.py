"""Rows for KTO: the answers of a packed batch one by one, and beside each an answer that belongs to another prompt.

Shape legend: R rows (answers) of a batch, desirable first, T tokens of the longest answer plus one.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwen2audio_train.batch import PreferenceBatch, UnpairedBatch
from qwen2audio_train.data.samples.collate import longest, pack_preference
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.layout import NUM_MEL_BINS


class Answers(Enum):
    """Layout of the answers of preference examples: in pairs, one by one, or so with foreign ones beside them."""

    paired = "paired"
    alone = "alone"
    with_foreign = "with_foreign"


def pack_unpaired(
    samples: Sequence[Sample], num_mel_bins: int = NUM_MEL_BINS, *, foreign: bool = True, share_prefixes: bool = True
) -> UnpairedBatch:
    """`pack_preference` with every pair as two answers; `foreign` adds the rows that the KL term is measured on."""
    batch = unpaired(pack_preference(samples, num_mel_bins, share_prefixes))
    return with_foreign_answers(batch) if foreign else batch


def unpaired(batch: PreferenceBatch) -> UnpairedBatch:
    """A batch of pairs as one of single answers: `label` (R,) bool and `pair_weight` (R,)."""
    if "label" in batch:
        return {**batch}
    weight = batch["pair_weight"].repeat(2)
    return {**batch, "label": torch.arange(len(weight)) < len(weight) // 2, "pair_weight": weight}


def with_foreign_answers(batch: UnpairedBatch) -> UnpairedBatch:
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
        segment = int(torch.searchsorted(starts, end, right=True)) - 1
        trunk = old_keys[batch["cu_k"][segment] : batch["cu_k"][segment + 1]]
        own = torch.arange(size, size + len(answer))
        size += len(answer)
        new_ids.append(ids[answer])
        new_positions.append(positions[end] + 1 + torch.arange(len(answer)))
        lengths.append((len(own), len(trunk) + len(own)))
        keys += [trunk, own]
        places.append(torch.cat([ends[row : row + 1], own]))
    kl_scatter = pad_sequence([*places, torch.full((2,), -1)], batch_first=True, padding_value=-1)[:-1]
    all_ids = torch.cat([ids, *new_ids])
    attended = kl_scatter >= 0
    completion = attended.long()
    completion[:, 0] = 0
    queries, attended_keys = torch.tensor(lengths, dtype=torch.long).view(-1, 2).unbind(1)
    cu_q, cu_k = _extended(batch["cu_q"], queries), _extended(batch["cu_k"], attended_keys)
    return {
        **batch,
        "cu_q": cu_q,
        "cu_k": cu_k,
        "max_q": longest(cu_q),
        "max_k": longest(cu_k),
        "packed_ids": all_ids[None],
        "packed_positions": torch.cat([positions, *new_positions])[None],
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
