"""How good an answer is: against the right one, by a function of the user's, or by a judge. More is better, 1 is best.

error_rate  1 - word error rate (character error rate where words are not spaced), at least 0
bleu        sentence BLEU / 100
exact       1 if the answer is the reference after normalisation, else 0
choice      1 if the answer names the right one of the options (`meta.choices`) and no other, else 0
format      1 if the answer is one of the options and nothing more, else 0
auto        one of these by the question's task, as evaluation has it
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.judging.client import Client
from qwen2audio_train.evaluation.judging.judge import TEMPLATE, Judged, Verdict, judge_answers
from qwen2audio_train.evaluation.scoring.items import OPEN_TASKS, TASK_METRICS
from qwen2audio_train.evaluation.scoring.metrics import bleu, chosen_option, edit_counts, is_right
from qwen2audio_train.pairs.questions import Question

Answered = Sequence[tuple[Question, Sequence[str]]]
"""Questions with their sampled answers."""

Scorer = Callable[[Answered], list[list[float | None]]]
"""A score of every answer to every question; None where there is none, because a judge refused, say."""

QuestionScorer = Callable[[Question, Sequence[str]], list[float]]


class ScoreError(UserError):
    """Answers that cannot be scored in the way that was asked for."""


def error_rate_score(question: Question, answers: Sequence[str]) -> list[float]:
    """1 - word or character error rate, at least 0."""
    references = [_reference(question)] * len(answers)
    edits, lengths = edit_counts(references, answers, [question.language] * len(answers))
    return [max(0.0, 1.0 - edit / max(1, length)) for edit, length in zip(edits, lengths, strict=True)]


def bleu_score(question: Question, answers: Sequence[str]) -> list[float]:
    """Sentence BLEU of each answer, in [0, 1]."""
    reference = _reference(question)
    return [bleu([reference], [answer], question.language, samples=0).value / 100 for answer in answers]


def exact_score(question: Question, answers: Sequence[str]) -> list[float]:
    """1 for the right answer, 0 for any other."""
    right = is_right([_reference(question)] * len(answers), answers, language=question.language)
    return [float(value) for value in right]


def auto_score(question: Question, answers: Sequence[str]) -> list[float]:
    """The score that goes with the question's task."""
    matching = SCORERS.get(TASK_METRICS.get(question.task or "", "exact"))
    if question.task is None or question.task in OPEN_TASKS or matching is None:
        known = question.task or "none; give meta.task"
        raise ScoreError(
            f'question "{question.id}": the score auto needs a task with one right answer, found {known}; or take '
            "error_rate, bleu, exact or file.py:function (for pairs also judge)"
        )
    return matching(question, answers)


def choice_score(question: Question, answers: Sequence[str]) -> list[float]:
    """1 where an answer names the right option and no other (`meta.choices`), else 0."""
    options = _options(question)
    return [float(chosen_option(answer, options) == _reference(question)) for answer in answers]


def format_score(question: Question, answers: Sequence[str]) -> list[float]:
    """1 where an answer is one of the options, word for word and nothing more, else 0."""
    options = {option.strip() for option in _options(question)}
    return [float(answer.strip() in options) for answer in answers]


SCORERS: dict[str, QuestionScorer] = {
    "error_rate": error_rate_score,
    "bleu": bleu_score,
    "exact": exact_score,
    "choice": choice_score,
    "format": format_score,
    "auto": auto_score,
}


def scorer(name: str, key: str | None = None) -> Scorer:
    """The scorer of that name, or the user's own function `file.py:function`; for a judge see `judge_scorer`.

    The function gets (question, answer), see `Question`, and returns a number.

    Args:
        key: full name of the key that asks for it; unset: `score=`, which may ask for a judge too.

    Raises:
        ScoreError: neither.
    """
    if name in SCORERS:
        return _for_all(SCORERS[name])
    path, colon, function_name = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        names = [*SCORERS, *([] if key else ["judge"])]
        raise ScoreError(f"{key or f'score={name}'}: expected one of {', '.join(names)}, or file.py:function")
    function = _load_function(Path(path), function_name, key or f"score={name}")
    return _for_all(lambda question, answers: [float(function(question, answer)) for answer in answers])


def judge_scorer(client: Client, outcomes: Counter[str], template: str = TEMPLATE) -> Scorer:
    """A scorer that asks a judge; what becomes of the answers is counted in `outcomes`.

    The audio is described by `question.description`, or else by the reference.
    """

    def score(answered: Answered) -> list[list[float | None]]:
        items = [
            Judged(f"{question.id}#{number}", _described(question), question.text, _reference(question), answer)
            for question, answers in answered
            for number, answer in enumerate(answers)
        ]
        judgement = judge_answers(client, items, template=template)
        outcomes.update(judgement.outcomes)
        found = iter(judgement.verdicts)
        return [[_judged(next(found)) for _ in answers] for _, answers in answered]

    return score


def judge_provenance(client: Client, template: str = TEMPLATE) -> dict[str, str]:
    """Which judge scored, and a hash of what it was asked."""
    digest = hashlib.sha256(template.encode()).hexdigest()[:16]
    return {"model": client.endpoint.model, "base_url": client.endpoint.base_url, "template_sha256": digest}


def _for_all(score: QuestionScorer) -> Scorer:
    return lambda answered: [list(score(question, answers)) for question, answers in answered]


def _judged(verdict: Verdict) -> float | None:
    return None if verdict.answer_score is None else (verdict.answer_score - 1.0) / 9.0


def _described(question: Question) -> str:
    return question.description or _reference(question)


def _load_function(path: Path, name: str, key: str) -> Callable[[Question, str], Any]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ScoreError(f"{key}: no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ScoreError(f"{key}: {path} has no function {name}")
    return function


def _options(question: Question) -> tuple[str, ...]:
    if not question.choices:
        raise ScoreError(f'question "{question.id}": no options to choose from; give meta.choices, or another score')
    return question.choices


def _reference(question: Question) -> str:
    if question.reference is None:
        raise ScoreError(
            f'question "{question.id}": no right answer to compare with; give it, or take file.py:function '
            "(for pairs also judge)"
        )
    return question.reference
