"""Which examples are held out: whole speakers or whole files, about the same share of every label."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from qwen2audio_train.data.examples import Example, TaskExample, clips_of
from qwen2audio_train.data.manifests.folders import SPLITS

MOST_LABELS = 50
"""Different answers that a corpus may have to count as a closed set."""

Groups = list[list[Example]]


def closed_set(examples: Sequence[Example]) -> list[str]:
    """The labels of a corpus whose answers are few and come again, twice each on average; else none."""
    targets = Counter(example.target for example in examples if isinstance(example, TaskExample))
    spoken = any(not isinstance(example, TaskExample) or example.task in ("asr", "s2tt") for example in examples)
    few = len(targets) <= MOST_LABELS and 2 * len(targets) <= len(examples)
    return sorted(targets) if few and not spoken else []


def speaker_of(example: Example) -> str | None:
    """Who speaks, where `meta.speaker` says so."""
    speaker = example.meta.get("speaker")
    return None if speaker in (None, "") else str(speaker)


def given_split(example: Example) -> str | None:
    """`train` or `test` (or `validation`), as `meta.split` or the first folder of the example's name has it."""
    said = str(example.meta.get("split") or example.id.replace("\\", "/").partition("/")[0]).lower()
    return next((names[0] for names in SPLITS if said in names), None)


def groups_of(examples: Sequence[Example], contents: Mapping[str, Sequence[str]], *, by_speaker: bool) -> Groups:
    """Examples that share a file, the same samples or (with `by_speaker`) a speaker, directly or through others.

    Args:
        contents: hashes of an example's audio by its id.
    """
    parent = list(range(len(examples)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = place = parent[parent[place]]
        return place

    first: dict[tuple[str, str], int] = {}
    for place, example in enumerate(examples):
        keys = [("file", clip.path) for clip in clips_of(example)]
        keys += [("content", content) for content in contents.get(example.id, ())]
        if by_speaker and (speaker := speaker_of(example)):
            keys.append(("speaker", speaker))
        for key in keys:
            parent[root(place)] = root(first.setdefault(key, place))
    groups: dict[int, list[Example]] = {}
    for place, example in enumerate(examples):
        groups.setdefault(root(place), []).append(example)
    return list(groups.values())


def hold_out(groups: Groups, label_of: Callable[[Example], str], share: float, seed: int) -> Groups:
    """Whole groups that together are about `share` of every label; training keeps some of each label.

    A group is taken where more than half of it is still wanted. Where there are two groups or more, at least one is
    taken, the smallest if need be.
    """
    counts = [Counter(map(label_of, group)) for group in groups]
    left = sum(counts, Counter[str]())
    wanted = Counter({label: max(1, round(share * count)) for label, count in left.items()})
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    taken = []
    for place in order:
        useful = sum((counts[place] & wanted).values())
        if 2 * useful > counts[place].total() and all(left[label] > n for label, n in counts[place].items()):
            taken.append(place)
            wanted, left = wanted - counts[place], left - counts[place]
    if not taken and len(groups) > 1:
        taken = [min(order, key=lambda place: len(groups[place]))]
    return [groups[place] for place in sorted(taken)]


def split(
    examples: Sequence[Example], contents: Mapping[str, Sequence[str]], share: float, seed: int
) -> tuple[list[Example], list[Example], str]:
    """Examples to train on, examples held out, and how they were told apart, in words.

    A split that the corpus has is kept. Speakers tell apart where every example has one and there are several.
    """
    given = [given_split(example) for example in examples]
    if {"train"} < set(given) - {None}:
        train = [example for example, name in zip(examples, given, strict=True) if name in ("train", None)]
        other = [example for example, name in zip(examples, given, strict=True) if name not in ("train", None)]
        return train, other, "as the corpus has it"
    speakers = {speaker_of(example) for example in examples}
    by_speaker = len(speakers) > 1 and None not in speakers
    groups = groups_of(examples, contents, by_speaker=by_speaker)
    if by_speaker and len(groups) < 2:
        by_speaker, groups = False, groups_of(examples, contents, by_speaker=False)
    labels = set(closed_set(examples))

    def label_of(example: Example) -> str:
        return example.target if labels and isinstance(example, TaskExample) else ""

    held_out = {example.id for group in hold_out(groups, label_of, share, seed) for example in group}
    how = f"by speaker, {len(speakers)} of them" if by_speaker else "by file"
    how += ", some of each label" if labels else ""
    train = [example for example in examples if example.id not in held_out]
    return train, [example for example in examples if example.id in held_out], how
