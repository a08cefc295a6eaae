"""Word timestamps: how far the times of recognised words are from the reference's.

Words stand between their times in seconds, of their own (`<0.32>good<0.61> <0.61>morning<1.10>`) or shared with their
neighbours (`<|0.32|>good<|0.61|>morning<|1.10|>`). The accumulated average shift (AAS) is the sum of
|start - start'| + |end - end'| over the words that both texts have, divided by how many these are (Qwen-Audio,
arXiv:2311.07919, and its script evaluate_srwt.py; start and end are added, not averaged). Which words these are is told
by the edits between the two word lists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jiwer

from qwen2audio_train.data.examples import Span
from qwen2audio_train.evaluation.scoring.bootstrap import Score, ratio_score

_TIME = re.compile(r"<\|?(\d+\.\d+)\|?>")
_TAG = re.compile(r"<\|(?!\d+\.\d+\|>).*?\|>")
"""A tag that is no time, such as `<|zh|>`."""


def timed_words(text: str) -> tuple[Span, ...] | None:
    """The words of a text with their times; None where one has no time on both sides, or there is none."""
    before, *rest = _TIME.split(_TAG.sub("", text).strip())
    times, words = list(map(float, rest[::2])), [word.strip() for word in rest[1::2]]
    if before or not words or words.pop():
        return None
    spans = zip(times, times[1:], words, strict=False)
    return tuple(Span(start, end, word) for start, end, word in spans if word) or None


def spoken(text: str) -> str:
    """The words alone."""
    return " ".join(_TIME.sub(" ", text).split())


def shifts_ms(references: Sequence[str], hypotheses: Sequence[str]) -> tuple[list[int], list[int], int]:
    """Per utterance the shifts in milliseconds and the words that they belong to, and how many could not be read."""
    shifts, counts, unread = [], [], 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        wanted, said = timed_words(reference), timed_words(hypothesis)
        unread += wanted is None or said is None
        pairs = _common(wanted or (), said or ())
        shifts.append(round(1000 * sum(abs(a.start_s - b.start_s) + abs(a.end_s - b.end_s) for a, b in pairs)))
        counts.append(len(pairs))
    return shifts, counts, unread


def average_shift(references: Sequence[str], hypotheses: Sequence[str], *, samples: int = 1000, seed: int = 0) -> Score:
    """AAS in milliseconds over the corpus; `extra` says how many utterances could not be read."""
    shifts, counts, unread = shifts_ms(references, hypotheses)
    return ratio_score("aas_ms", shifts, counts, samples=samples, seed=seed, extra={"unparsed": float(unread)})


def _common(wanted: Sequence[Span], said: Sequence[Span]) -> list[tuple[Span, Span]]:
    """The words that both have, as they stand in each."""
    if not wanted or not said:
        return []
    numbers = {word.text: str(number) for number, word in enumerate((*wanted, *said))}  # a word may hold a blank
    reference, hypothesis = (" ".join(numbers[word.text] for word in words) for words in (wanted, said))
    return [
        (wanted[chunk.ref_start_idx + i], said[chunk.hyp_start_idx + i])
        for chunk in jiwer.process_words(reference, hypothesis).alignments[0]
        if chunk.type == "equal"
        for i in range(chunk.ref_end_idx - chunk.ref_start_idx)
    ]
