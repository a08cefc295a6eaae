"""Which of the scored answers become a pair: margin, length, duplicates; and what was left out, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from qwen2audio_train.data.examples import PreferenceExample
from qwen2audio_train.evaluation.scoring.normalise import normalise
from qwen2audio_train.pairs.questions import Question, pair


class Chosen(StrEnum):
    """Where the chosen answer comes from: the best sampled one (both sides in the model's style), or the reference."""

    best = "best"
    reference = "reference"


@dataclass(frozen=True)
class Selection:
    """What makes a pair.

    Attributes:
        min_margin: score of the chosen answer minus that of a rejected one, at least.
        min_chosen: score of the chosen answer, at least; a pair of two bad answers teaches little.
        max_length_ratio: characters of the longer answer over those of the shorter one, at most.
        max_rejected: rejected answers of a question, the worst ones.
    """

    chosen: Chosen = Chosen.best
    min_margin: float = 0.1
    min_chosen: float = 0.0
    max_length_ratio: float = 1.5
    max_rejected: int = 1


def select(
    question: Question,
    answers: Sequence[str],
    scores: Sequence[float | None],
    rules: Selection,
    made_by: dict[str, Any],
    left: Counter[str],
) -> PreferenceExample | None:
    """The pair of a question, or None with the reason counted in `left`.

    Args:
        scores: None for an answer that could not be scored (a judge's refusal, say).
        made_by: provenance; the scores of the pair are added.
    """
    scored = _distinct(question, answers, scores)
    if rules.chosen is Chosen.reference:
        if question.reference is None:
            left["no_reference"] += 1
            return None
        chosen, best = question.reference, 1.0
        scored.pop(normalise(chosen, question.language), None)
    else:
        if not scored:
            left["nothing_scored"] += 1
            return None
        chosen, best = max(scored.values(), key=lambda item: item[1])
    if best < rules.min_chosen:
        left["chosen_too_bad"] += 1
        return None
    worse = [(text, score) for text, score in scored.values() if best - score >= rules.min_margin and text != chosen]
    if not worse:
        left["no_margin"] += 1
        return None
    alike = [item for item in worse if _ratio(item[0], chosen) <= rules.max_length_ratio]
    if not alike:
        left["length"] += 1
        return None
    rejected = sorted(alike, key=lambda item: item[1])[: rules.max_rejected]
    figures = {"chosen_score": round(best, 4), "rejected_scores": [round(score, 4) for _, score in rejected]}
    made = {**made_by, **figures, "chosen_from": rules.chosen.value}
    return pair(question, chosen, [text for text, _ in rejected], made)


def _distinct(
    question: Question, answers: Sequence[str], scores: Sequence[float | None]
) -> dict[str, tuple[str, float]]:
    """Answers with their scores, by what is left after normalisation; empty ones and those without a score go."""
    distinct: dict[str, tuple[str, float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        text = answer.strip()
        if text and score is not None:
            distinct.setdefault(normalise(text, question.language), (text, score))
    return distinct


def _ratio(a: str, b: str) -> float:
    shorter, longer = sorted((len(a), len(b)))
    return longer / max(1, shorter)
