"""A reward of one's own, as a user writes it."""

from __future__ import annotations

from qwen2audio_train.pairs.questions import Question


def short(question: Question, answer: str) -> float:
    """Minus the letters of the answer, and a point for each that the reference begins with."""
    return sum(letter in (question.reference or "") for letter in answer) - len(answer) / 2
