"""Samples end to end in one row: the packed batch that the model's forward takes.

Shapes: N tokens, M targets, S segments, K keys, A encoder windows, F mel columns, n audio tokens, t tokens of
transcripts; B pairs of T tokens.

Two samples, an audio one [a a | b c] and a text one [d e], where c and e are learnt, give

    input_ids     [[a, a, b, c, d, e]]       position_ids [[0, 1, 2, 3, 0, 1]]
    predict_from  [2, 4]    target [c, e]    weight [1., 1.]    source_id [0, 1]
    cu_q = cu_k   [0, 4, 6]                  audio_slot [0, 1]      max_q = max_k = 4

`indexed` adds what the family's tower has to know of where the clips lie.

A tree (prompt p q, chosen x y, rejected z) has its prompt once; every answer is a segment whose queries are the
answer's tokens and whose keys are the prompt's and its own, listed in key_index:

    packed_ids    [[p, q, x, y, z]]          packed_positions [[0, 1, 2, 3, 2]]
    cu_q [0, 2, 4, 5]    cu_k [0, 2, 6, 9]   key_index [0, 1,  0, 1, 2, 3,  0, 1, 4]
    input_ids     [[q, x, y], [q, z, 0]]     scatter [[1, 2, 3], [1, 4, -1]]

Samples that begin alike (`prefixes`) are trees too: what they share is a segment of its own, and stands once in front.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np
import torch

from qwen2audio_train.batch import Audio, Batch, PackedBatch, PreferenceBatch, Segments, Transcripts
from qwen2audio_train.config.data import LossWeighting
from qwen2audio_train.data.examples import DESIRABLE, PAIRED, UNDESIRABLE
from qwen2audio_train.data.samples.prefixes import Prefix, shared_prefixes
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.families.family import Family
from qwen2audio_train.layout import MIN_FRAMES, NUM_MEL_BINS


def pack(
    samples: Sequence[Sample],
    loss_weighting: LossWeighting = LossWeighting.token,
    num_mel_bins: int = NUM_MEL_BINS,
    share_prefixes: bool = True,
) -> PackedBatch:
    """The packed batch of some samples; of none it is a filler of one token without targets.

    `weight` of a target is `sample.weight` under "token", so that every label counts the same, and
    `sample.weight / number of the sample's targets` under "sample", so that every sample does. "task" is "sample" with
    `sample.weight` taken from `task_weights`, so that every task has the same total weight in expectation.

    `transcript` (t,) holds the transcripts of the encoder windows end to end, `transcript_length` (A,) their lengths,
    0 where a window has none.
    """
    rows = _Rows(samples, share_prefixes)
    targets = [_targets(sample, place, loss_weighting) for sample, place in zip(samples, rows.places, strict=True)]
    predict_from, target, weight, source_id = (np.concatenate([[], *column]) for column in _columns(targets, 4))
    return {
        "input_ids": rows.input_ids(),
        "position_ids": rows.position_ids(),
        "predict_from": _int64(predict_from),
        "target": _int64(target),
        "weight": torch.from_numpy(weight.astype(np.float32)),
        "source_id": _int64(source_id),
        **rows.segments(),
        **_audio(samples, rows.places, num_mel_bins),
        **_transcripts(samples, rows.places),
    }


class PromptBatch(TypedDict):
    """Prompts that are packed once they have been answered."""

    prompts: list[Sample]


LoadedBatch = Batch | PromptBatch
"""What a loader gives: which of them, its stage knows."""


def indexed(batch: Batch, family: Family) -> Batch:
    """The batch with the family's index of its clips; without a clip that of the dummy that the tower then runs on."""
    index = family.clip_index(batch["clip_frames"].tolist() or [MIN_FRAMES])
    arrays = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in index.items()}
    return cast(Batch, {**batch, **arrays})


def on_device(batch: Batch, device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on a device; the host does not wait for pinned ones."""
    return {n: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}


def unpacked(samples: Sequence[Sample]) -> PromptBatch:
    """The samples as they are."""
    return {"prompts": list(samples)}


def task_weights(shares: Mapping[str, float]) -> dict[str, float]:
    """Weights per sample that give every task the same expected share of the loss under "task".

    Args:
        shares: probability that a drawn sample belongs to the task. The expected weight of a sample stays 1.
    """
    total = sum(shares.values())
    return {task: total / (len(shares) * share) for task, share in shares.items() if share > 0}


def pack_preference(
    samples: Sequence[Sample], num_mel_bins: int = NUM_MEL_BINS, share_prefixes: bool = True
) -> PreferenceBatch:
    """The packed batch of preference samples, one tree each, and the rows that TRL's loss reads.

    A pair's row holds the last token of the prompt (`completion_mask` 0), from which the answer's first token is
    predicted, and the answer. Chosen rows come first; a sample with several rejected answers gives as many pairs, which
    share the chosen branch. `scatter` (2B, T) says where in N a row's token stands, -1 for padding.
    No samples at all give a filler: one dummy pair with `pair_weight` 0. `pair_key` (B, 2) int64 names
    a pair by a hash of its id, prompt, answers and spectrograms, for stored reference log-probabilities.

    With an unpaired sample among them all R answers are rows by themselves: `label` (R,) bool, the desirable ones
    first, and `pair_weight` (R,).
    """
    real = bool(samples)
    samples = samples or [_FILLER_PAIR]
    for sample in samples:
        if len(sample.branches) < 2 and sample.task not in (DESIRABLE, UNDESIRABLE):
            raise ValueError(f'sample "{sample.id}" has {len(sample.branches)} answers: a preference needs two or more')
    rows = _Rows(samples, share_prefixes)
    chosen, rejected, keys = [], [], []
    for sample, place in zip(samples, rows.places, strict=True):
        answers = [np.concatenate([place.trunk[-1:], branch]) for branch in place.branches]
        if sample.task == UNDESIRABLE:
            rejected += answers
        elif sample.task == DESIRABLE:
            chosen += answers
        else:
            first, *others = answers
            chosen += [first] * len(others)
            rejected += others
            keys += [_pair_key(sample, branch) for branch in sample.branches[1:]]
    paired = len(keys) == len(chosen) == len(rejected)
    scatter = _padded([*chosen, *rejected])
    ids = rows.input_ids()
    attended = scatter >= 0
    completion = attended.clone()
    completion[:, 0] = False
    batch: PreferenceBatch = {
        "packed_ids": ids,
        "packed_positions": rows.position_ids(),
        "scatter": scatter,
        "input_ids": torch.where(attended, ids[0, scatter.clamp(min=0)], 0),
        "attention_mask": attended.long(),
        "completion_mask": completion.long(),
        "pair_weight": torch.full((len(keys) if paired else len(scatter),), float(real)),
        **rows.segments(),
        **_audio(samples, rows.places, num_mel_bins),
    }
    if paired:
        batch["pair_key"] = torch.from_numpy(np.stack(keys))
    else:
        batch["label"] = torch.arange(len(scatter)) < len(chosen)
    return batch


@dataclass(frozen=True)
class _Place:
    """Where a sample's tokens stand in the row: its trunk, every branch; and whether its clips are another sample's."""

    trunk: np.ndarray
    branches: list[np.ndarray]
    hears_another: bool


class _Rows:
    """The row under construction."""

    def __init__(self, samples: Sequence[Sample], share_prefixes: bool) -> None:
        self.places: list[_Place] = []
        self._ids: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []
        self._size = 0
        self._is_tree = False
        self._prefixes: dict[Prefix, np.ndarray] = {}
        found = shared_prefixes(samples) if share_prefixes else [None] * len(samples)
        for index, (sample, prefix) in enumerate(zip(samples, found, strict=True)):
            self._add(index, sample, self._rows_of(prefix, samples), prefix)

    def _rows_of(self, prefix: Prefix | None, samples: Sequence[Sample]) -> np.ndarray:
        """Where the tokens up to the end of a prefix stand; they are laid down when they are first asked for."""
        if prefix is None:
            return np.zeros(0, dtype=np.int64)
        if prefix not in self._prefixes:
            before, owner = self._rows_of(prefix.parent, samples), samples[prefix.owner]
            part = slice(prefix.start, prefix.end)
            own = self._add_segment(owner.input_ids[part], owner.positions[part], before)
            self._prefixes[prefix] = np.concatenate([before, own])
        return self._prefixes[prefix]

    def _add(self, index: int, sample: Sample, before: np.ndarray, prefix: Prefix | None) -> None:
        rest = slice(len(before), None)
        own = self._add_segment(sample.input_ids[rest], sample.positions[rest], before)
        trunk = np.concatenate([before, own])
        after = sample.positions[-1] + 1
        branches = [
            self._add_segment(branch, after + np.arange(len(branch)), trunk, is_branch=True)
            for branch in sample.branches
        ]
        hears = [part.owner for part in prefix.chain() if part.holds(sample.audio_slot)] if prefix else []
        self.places.append(_Place(trunk, branches, bool(hears) and hears[0] != index))

    def _add_segment(
        self, ids: np.ndarray, positions: np.ndarray, before: np.ndarray, is_branch: bool = False
    ) -> np.ndarray:
        """Lay tokens down that attend to `before` and to themselves; returns where they stand."""
        own = np.arange(self._size, self._size + len(ids))
        self._size += len(ids)
        self._ids.append(ids)
        self._positions.append(positions)
        self._keys.append(np.concatenate([before, own]))
        self._is_tree |= is_branch or len(before) > 0
        return own

    def input_ids(self) -> torch.Tensor:
        return _int64(np.concatenate(self._ids or [np.zeros(1)]))[None]

    def position_ids(self) -> torch.Tensor:
        return _int64(np.concatenate(self._positions or [np.zeros(1)]))[None]

    def segments(self) -> Segments:
        cu_q, cu_k = (_borders([len(part) for part in parts] or [1]) for parts in (self._ids, self._keys))
        segments: Segments = {"cu_q": cu_q, "cu_k": cu_k, "max_q": longest(cu_q), "max_k": longest(cu_k)}
        if self._is_tree:
            segments["key_index"] = _int64(np.concatenate(self._keys))
        return segments


def longest(borders: torch.Tensor) -> int:
    """Length of the longest segment between borders (S + 1,)."""
    return int(borders.diff().max())


def _targets(sample: Sample, place: _Place, weighting: LossWeighting) -> tuple[np.ndarray, ...]:
    """predict_from, target, weight, source_id of one sample."""
    labelled = np.flatnonzero(sample.label_mask)
    predict_from = [place.trunk[labelled - 1]]
    target = [sample.input_ids[labelled]]
    for branch, where in zip(sample.branches, place.branches, strict=True):
        predict_from.append(np.concatenate([place.trunk[-1:], where[:-1]]))
        target.append(branch)
    count = sum(len(part) for part in target)
    weight = sample.weight if weighting == "token" else sample.weight / max(count, 1)
    return (
        np.concatenate(predict_from),
        np.concatenate(target),
        np.full(count, weight),
        np.full(count, sample.source_id),
    )


def _audio(samples: Sequence[Sample], places: Sequence[_Place], num_mel_bins: int) -> Audio:
    heard = [(sample, place) for sample, place in zip(samples, places, strict=True) if not place.hears_another]
    mels = [mel for sample, _ in heard for mel in sample.mels]
    mel = np.concatenate(mels, axis=1) if mels else np.zeros((num_mel_bins, 0), dtype=np.float32)
    return {
        "mel": torch.from_numpy(mel),
        "clip_frames": torch.tensor([frames for sample, _ in heard for frames in sample.clip_frames]).long(),
        "audio_slot": _int64(np.concatenate([[], *(place.trunk[sample.audio_slot] for sample, place in heard)])),
    }


def _transcripts(samples: Sequence[Sample], places: Sequence[_Place]) -> Transcripts:
    heard = [sample for sample, place in zip(samples, places, strict=True) if not place.hears_another]
    lengths = [len(sample.transcript) if index == 0 else 0 for sample in heard for index in range(len(sample.mels))]
    return {
        "transcript": _int64(np.concatenate([[], *(sample.transcript for sample in heard)])),
        "transcript_length": torch.tensor(lengths, dtype=torch.int64),
    }


def _columns(rows: Sequence[tuple[np.ndarray, ...]], width: int) -> list[list[np.ndarray]]:
    return [[row[index] for row in rows] for index in range(width)]


def _borders(lengths: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))


def _pair_key(sample: Sample, rejected: np.ndarray) -> np.ndarray:
    """128 bits over what a pair's log-probabilities depend on: id, prompt, both answers, and what is heard."""
    clips = np.array(sample.clip_frames, dtype=np.int64)
    digest = hashlib.blake2b(sample.id.encode(), digest_size=16)
    for ids in (sample.input_ids, clips, sample.branches[0], rejected):
        digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
    for mel in sample.mels:
        digest.update(np.ascontiguousarray(mel).tobytes())
    return np.frombuffer(digest.digest(), "<i8").astype(np.int64)


def _padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    padded = np.full((len(rows), max(len(row) for row in rows)), -1)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return _int64(padded)


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array).astype(np.int64))


_FILLER_PAIR = Sample(
    id="filler",
    source="",
    task=PAIRED,
    input_ids=np.zeros(1, dtype=np.int64),
    label_mask=np.zeros(1, dtype=bool),
    audio_slot=np.zeros(0, dtype=np.int64),
    branches=(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)),
)
