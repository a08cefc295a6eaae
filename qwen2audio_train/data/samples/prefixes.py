"""What the samples of a pack begin with alike: a tree over different samples, whose prefixes are computed once.

Chats begin with the same system turn and markup (some 20 tokens before a clip's 25 a second), and several questions
about one clip share the clip too. In causal attention a prefix depends on nothing after it, so that its hidden states
are the same for all samples that begin with it, and its gradient is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qwen2audio_train.data.samples.sample import Sample

MIN_SHARED = 8
"""Shorter prefixes are left where they are: each becomes a segment of its own, an attention call on the CPU."""

_PROBE = 61
"""Every so many columns of two spectrograms are compared before all of them are."""


@dataclass(frozen=True)
class Prefix:
    """Tokens `start:end` of the sample `owner`, which others have too; what is before them is in `parent`."""

    owner: int
    start: int
    end: int
    parent: Prefix | None

    def holds(self, places: np.ndarray) -> bool:
        """Whether places of the owner's trunk lie in it."""
        return len(places) > 0 and self.start <= places[0] < self.end

    def chain(self) -> Iterator[Prefix]:
        """The prefixes from the first token on, this one last."""
        if self.parent is not None:
            yield from self.parent.chain()
        yield self


def shared_prefixes(samples: Sequence[Sample]) -> list[Prefix | None]:
    """For each sample the last of the prefixes that it shares with others, or None.

    Tokens are alike where their ids, their positions and the clip that they stand for are. At least one token of a
    sample is its own. A clip with a transcript is not shared, as each of them is a label of the CTC objective, nor are
    several clips of one sample.
    """
    found: list[Prefix | None] = [None] * len(samples)
    tokens = _tokens(samples)
    open_groups: list[tuple[list[int], int, Prefix | None]] = [(list(range(len(samples))), 0, None)]
    while open_groups:
        members, start, parent = open_groups.pop()
        for member in members:
            found[member] = parent
        if len(members) < 2:
            continue
        end = min(_common(tokens[members[0]], tokens[member], start) for member in members)
        if end - start >= MIN_SHARED:
            parent = Prefix(members[0], start, end, parent)
            start = end
            for member in members:
                found[member] = parent
        apart: dict[bytes, list[int]] = {}
        for member in members:
            if len(tokens[member]) > end:
                apart.setdefault(tokens[member][end].tobytes(), []).append(member)
        open_groups += [(group, start, parent) for group in apart.values() if len(group) > 1]
    return found


def _common(first: np.ndarray, other: np.ndarray, start: int) -> int:
    """Tokens that two samples have in common from the beginning, given that they do up to `start`."""
    length = min(len(first), len(other))
    differs = (first[start:length] != other[start:length]).any(axis=1)
    return start + int(differs.argmax()) if differs.any() else length


def _tokens(samples: Sequence[Sample]) -> list[np.ndarray]:
    """(T - 1, 3) of each sample: ids, positions, and the number of the clip that a token stands for, or -1."""
    result = []
    for sample, number in zip(samples, _clip_numbers(samples), strict=True):
        clip = np.full(len(sample.input_ids), -1)
        clip[sample.audio_slot] = number
        result.append(np.stack([sample.input_ids, sample.positions, clip], axis=1)[:-1])
    return result


def _clip_numbers(samples: Sequence[Sample]) -> list[int]:
    """A number for the audio of each sample, which only samples with the same clip share."""
    numbers: list[int] = []
    alike: dict[tuple[int, bytes], list[int]] = {}
    for index, sample in enumerate(samples):
        numbers.append(index)
        if len(sample.mels) == 1 and len(sample.transcript) == 0:
            mel = sample.mels[0]
            twins = alike.setdefault((sample.clip_frames[0], mel[:, ::_PROBE].tobytes()), [])
            twin = next((other for other in twins if np.array_equal(mel, samples[other].mels[0])), index)
            numbers[index] = twin
            twins += [index] if twin == index else []
    return numbers
