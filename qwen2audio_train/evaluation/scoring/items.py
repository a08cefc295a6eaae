"""Examples as evaluation sees them: a reference, the kind of answer, and the majority answer, which needs no audio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen2audio_train.data.examples import ChatExample, Clip, Example, TaskExample
from qwen2audio_train.evaluation.scoring.benchmarks import Metric, benchmarks
from qwen2audio_train.evaluation.scoring.normalise import normalise, units

TASK_METRICS: dict[str, Metric] = {
    "asr": "error_rate",
    "dasr": "error_rate",
    "osr": "error_rate",
    "s2tt": "bleu",
    "srwt": "timestamps",
    "sf": "slot_f1",
    "ner": "slot_f1",
    "sed": "event_f1",
    "sg": "span_iou",
    "ag": "span_iou",
    "sd": "diarization_error_rate",
}
"""Metric of a task; every other task has short answers and is scored by accuracy. The pools name the metric that a task
asks for; a test keeps the two together."""

OPEN_TASKS = frozenset({"aac", "mc"})
"""Captions, which only a judge or `meta.references`, all that are right, can score."""


@dataclass(frozen=True)
class Item:
    """One held-out example.

    `meta` may hold: `unseen_words` (words of the reference that training never had), `said` (what is spoken in each
    clip), `answer` (of a question that is to be transcribed), `choices`, `kind` (for a breakdown), `no_speech` (true
    where nobody speaks), `references` (all captions that are right), and `task` and `language` for a chat example,
    which has no fields for them.
    """

    id: str
    source: str
    task: str
    language: str | None
    text_language: str | None
    question: str | None
    reference: str | None
    metric: Metric | None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> str | None:
        """What is spoken in the last clip, where the manifest tells."""
        said = self.meta.get("said")
        if isinstance(said, list):
            said = said[-1] if said else None
        return said or None


def item_of(example: Example) -> Item | None:
    """The example as an item; None for a preference, which has no single right answer."""
    if isinstance(example, TaskExample):
        return _item(
            example,
            task=example.task,
            language=example.language,
            text_language=example.text_language,
            question=example.question,
            reference=example.target,
        )
    if not isinstance(example, ChatExample):
        return None
    *_, last = example.messages
    answered = last.role == "assistant"
    asked = next(m for m in reversed(example.messages) if m.role == "user")
    kind = example.meta.get("kind")
    task = example.meta.get("task") or ("asr" if kind == "transcript" else example.mode or "chat")
    return _item(
        example,
        task=task,
        language=example.meta.get("language"),
        text_language=example.meta.get("text_language"),
        question=" ".join(part for part in asked.content if not isinstance(part, Clip)) or None,
        reference="".join(map(str, last.content)) if answered else None,
    )


def _item(example: Example, *, task: str, **fields: Any) -> Item:
    known = benchmarks().get(example.source)
    if example.meta.get("no_speech"):
        metric: Metric | None = "hallucination"
    elif known is not None:
        metric = known.metric
    else:
        metric = _task_metric(task, example.meta)
    if metric not in ("error_rate", "bleu", "timestamps"):
        # One question about recordings of several languages is one task; split by language it would have other chances.
        fields["language"] = None
    return Item(example.id, example.source, task, metric=metric, meta=example.meta, **fields)


def _task_metric(task: str, meta: Mapping[str, Any]) -> Metric | None:
    if task in OPEN_TASKS:
        return "captions" if meta.get("references") else None
    return TASK_METRICS.get(task, "accuracy")


@dataclass(frozen=True)
class Seen:
    """What training had: its words per language, and its most frequent answers."""

    words: Mapping[str | None, frozenset[str]] = field(default_factory=dict)
    answers: Mapping[tuple[str | None, str, str | None], str] = field(default_factory=dict)
    """Most frequent answer by source, task and question; None stands for all sources, and for all questions."""

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Seen:
        """Read off the training examples."""
        words: dict[str | None, set[str]] = {}
        counts: dict[tuple[str | None, str, str | None], Counter[str]] = {}
        for item in filter(None, map(item_of, examples)):
            if item.reference is None:
                continue
            if item.metric == "error_rate":
                words.setdefault(item.language, set()).update(units(item.reference, item.language))
            elif item.metric != "bleu":
                answer = normalise(item.reference, item.language)
                for key in _answer_keys(item):
                    counts.setdefault(key, Counter())[answer] += 1
        return cls(
            {language: frozenset(found) for language, found in words.items()},
            {key: answers.most_common(1)[0][0] for key, answers in counts.items()},
        )

    def unseen_words(self, item: Item) -> frozenset[str] | None:
        """Words of the reference that training did not have; None where that is not known."""
        if "unseen_words" in item.meta:
            return frozenset(normalise(word, item.language) for word in item.meta["unseen_words"])
        known = self.words.get(item.language)
        return None if known is None else frozenset(units(item.reference or "", item.language)) - known

    def majority(self, items: Sequence[Item]) -> list[str]:
        """Per item the most frequent answer of training to its question: in its source, or else in any; or the
        commonest here."""
        references = Counter(normalise(item.reference or "", item.language) for item in items)
        fallback = references.most_common(1)[0][0] if references else ""
        found = [[self.answers[key] for key in _answer_keys(item) if key in self.answers] for item in items]
        return [answers[0] if answers else fallback for answers in found]


def _answer_keys(item: Item) -> list[tuple[str | None, str, str | None]]:
    """Keys of `Seen.answers` for an item, the nearest first and each once."""
    keys = [(source, item.task, question) for source in (item.source, None) for question in (item.question, None)]
    return list(dict.fromkeys(keys))
