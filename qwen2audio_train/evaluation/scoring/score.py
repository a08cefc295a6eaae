"""Decoded texts and what was asked for, to scores per source, task and language.

Every metric that is a share or a rate is counted per utterance (`counts_of`), so that a score, its interval and the
comparison of two runs come from the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen2audio_train.evaluation.scoring import captions, labels, metrics, spans, timestamps
from qwen2audio_train.evaluation.scoring.benchmarks import Metric, benchmarks
from qwen2audio_train.evaluation.scoring.bootstrap import Score, proportion, ratio_score
from qwen2audio_train.evaluation.scoring.items import Item, Seen
from qwen2audio_train.evaluation.scoring.normalise import normalise
from qwen2audio_train.evaluation.scoring.recipes import BESIDE, REFERENCE

STAMPS: dict[Metric, str] = {
    "error_rate": REFERENCE.stamp,
    "bleu": "sacrebleu/1",
    "accuracy": "normalised/1",
    "exact_accuracy": "exact/1",
    "choice": "option_words/1",
    "letter": "option_letter/2",
    "hallucination": "any_words/1",
    "map": "labels/1",
    "timestamps": "aas/1",
    "slot_f1": "slots/1",
    "event_f1": "events_200ms_half/1",
    "span_iou": "spans/1",
    "diarization_error_rate": "der_no_collar/1",
}
"""Name and version of how an answer is read and scored, by metric; raised whenever a change can move a number."""

Counts = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Row:
    """One score; `kind` names a part of the source, "" is all of it.

    Attributes:
        published: other people's figures for it.
        scoring: how answers were read and scored, with its version: `reference/2`.
        prompt: how the items were asked, with a version (`asked.asked_by`): `librispeech_test_clean/1`.
    """

    source: str
    task: str
    language: str | None
    kind: str
    score: Score
    published: dict[str, float] = field(default_factory=dict)
    scoring: str = ""
    prompt: str = ""


def score_texts(
    decoded: Sequence[tuple[Item, str]], seen: Seen, *, bootstrap_samples: int = 1000, seed: int = 0
) -> list[Row]:
    """Scores of decoded texts, grouped by source, task, language and metric."""
    settings: dict[str, Any] = {"samples": bootstrap_samples, "seed": seed}
    rows = []
    for (source, task, language, metric), group in grouped(decoded).items():
        known = benchmarks().get(source)
        items, texts = [item for item, _ in group], [text for _, text in group]
        stamp = stamp_of(metric)
        main, *others = _scores(metric, items, texts, seen, settings)
        rows.append(Row(source, task, language, "", main, dict(known.published) if known else {}, stamp))
        others += [*_unseen(metric, items, texts, seen, settings), *_mode_confusion(items, texts, settings)]
        also = known.also if known else {}
        rows += [Row(source, task, language, "", score, dict(also.get(score.metric, {})), stamp) for score in others]
        rows += [
            Row(source, task, language, kind, score, {}, stamp)
            for kind, score in _by_kind(metric, group, seen, settings)
        ]
    return rows


def stamp_of(metric: Metric) -> str:
    """How answers are read and scored, with its version."""
    return captions.stamp() if metric == "captions" else STAMPS[metric]


def check_libraries(items: Sequence[Item]) -> None:
    """Score nothing at all: raises MissingLibraryError before anything is decoded that could not be scored."""
    first = {(item.source, item.task, item.language, item.metric): (item, "") for item in items}
    score_texts(list(first.values()), Seen(), bootstrap_samples=0)


def grouped(
    decoded: Sequence[tuple[Item, str]],
) -> dict[tuple[str, str, str | None, Metric], list[tuple[Item, str]]]:
    """Items with their texts by source, task, language and metric; what has none of its own is left out."""
    groups: dict[tuple[str, str, str | None, Metric], list[tuple[Item, str]]] = {}
    for item, text in decoded:
        if item.reference is not None and item.metric is not None and item.metric != "judge":
            groups.setdefault((item.source, item.task, item.language, item.metric), []).append((item, text))
    return groups


def counts_of(metric: Metric, items: Sequence[Item], texts: Sequence[str]) -> Counts | None:
    """Errors (or right answers) and what they are counted out of, per utterance; None where they do not add up (BLEU).

    Items of one group: all have the same language.
    """
    references, language = [item.reference or "" for item in items], items[0].language
    if metric in ("bleu", "captions", "map"):
        return None
    if metric == "timestamps":
        return timestamps.shifts_ms(references, texts)[:2]
    if metric in spans.COUNTS:
        counted = [spans.COUNTS[metric](wanted, said, language) for wanted, said in zip(references, texts, strict=True)]
        return [top for top, _ in counted], [bottom for _, bottom in counted]
    if metric == "error_rate":
        return metrics.edit_counts(references, texts, [language] * len(items))
    if metric == "hallucination":
        flags = metrics.wrote_words(references, texts, language)
    elif metric == "choice":
        flags = [int(said == wanted) for said, wanted in zip(_chosen(items, texts), references, strict=True)]
    elif metric == "letter":
        flags = [int(said == wanted) for said, wanted in zip(_letters(items, texts), references, strict=True)]
    else:
        flags = metrics.is_right(references, texts, language=language, exact=metric == "exact_accuracy")
    return flags, [1] * len(flags)


def _scores(
    metric: Metric, items: Sequence[Item], texts: Sequence[str], seen: Seen, settings: dict[str, Any]
) -> list[Score]:
    """The score of a metric, and what always stands beside it."""
    references = [item.reference or "" for item in items]
    if metric == "captions":
        return captions.caption_scores(
            [item.meta.get("references") or [item.reference] for item in items], texts, **settings
        )
    if metric == "map":
        classes = sorted({label.strip() for item in items for label in _labels(item)})
        right, named = (labels.label_table(lines, classes) for lines in (references, texts))
        score = labels.mean_average_precision(right, named, **settings)
        score.extra["unparsed"] = float((~named.any(axis=1)).sum())
        return [score]
    if metric == "timestamps":
        wanted, said = ([timestamps.spoken(text) for text in lines] for lines in (references, texts))
        rate = metrics.error_rate(wanted, said, items[0].language, **settings)
        return [timestamps.average_shift(references, texts, **settings), rate]
    main = _main_score(metric, items, texts, seen, settings)
    return [main, metrics.chrf(references, texts, **settings)] if metric == "bleu" else [main]


def _labels(item: Item) -> list[str]:
    return item.meta.get("choices") or (item.reference or "").split(",")


def _main_score(
    metric: Metric, items: Sequence[Item], texts: Sequence[str], seen: Seen, settings: dict[str, Any]
) -> Score:
    references, language = [item.reference or "" for item in items], items[0].language
    if metric == "error_rate":
        rate = metrics.error_rate(references, texts, language, **settings)
        rate.extra.update(_other_recipes(items, texts))
        return rate
    if metric == "bleu":
        return metrics.bleu(references, texts, items[0].text_language, **settings)
    if metric in spans.COUNTS:
        counted = counts_of(metric, items, texts)
        assert counted is not None
        return ratio_score(metric, *counted, **settings)
    if metric in ("choice", "letter", "hallucination"):
        counted = counts_of(metric, items, texts)
        assert counted is not None
        name = "hallucination" if metric == "hallucination" else "accuracy"
        return proportion(name, counted[0], extra=_guessing(metric, items, texts), **settings)
    options = _options(items)
    score = metrics.accuracy(
        references,
        texts,
        language=language,
        exact=metric == "exact_accuracy",
        choices=options,
        majority=seen.majority(items),
        **settings,
    )
    answers = [{normalise(option, language) for option in known} for known in options]
    off = sum(normalise(text, language) not in known for text, known in zip(texts, answers, strict=True))
    score.extra["unparsed"] = float(off)
    beside: Metric = "accuracy" if metric == "exact_accuracy" else "exact_accuracy"
    flags = metrics.is_right(references, texts, language=language, exact=beside == "exact_accuracy")
    score.extra[STAMPS[beside]] = sum(flags) / len(flags)
    return score


def _options(items: Sequence[Item]) -> list[Sequence[str]]:
    """Possible answers per item: its own choices, or else the references that occur among items of its kind."""
    by_kind: dict[Any, set[str]] = {}
    for item in items:
        by_kind.setdefault(item.meta.get("kind"), set()).add(normalise(item.reference or "", item.language))
    return [item.meta.get("choices") or sorted(by_kind[item.meta.get("kind")]) for item in items]


def _chosen(items: Sequence[Item], texts: Sequence[str]) -> list[str | None]:
    """The option that each text names by its words; None where it names none or several."""
    return [metrics.chosen_option(text, item.meta.get("choices", ())) for item, text in zip(items, texts, strict=True)]


def _letters(items: Sequence[Item], texts: Sequence[str]) -> list[str | None]:
    """The letter that each text names, of the item's choices (of four where it lists none)."""
    counts = [len(item.meta.get("choices", ())) or 4 for item in items]
    return list(map(metrics.chosen_letter, texts, counts))


def _guessing(metric: Metric, items: Sequence[Item], texts: Sequence[str]) -> dict[str, float]:
    """What a guess would get, and how many answers name no option: they count as wrong and are never guessed."""
    if metric == "hallucination":
        return {}
    said = _chosen(items, texts) if metric == "choice" else _letters(items, texts)
    chance = sum(1 / max(1, len(item.meta.get("choices", ()))) for item in items) / len(items)
    return {"chance": chance, "unparsed": float(sum(answer is None for answer in said))}


def _other_recipes(items: Sequence[Item], texts: Sequence[str]) -> dict[str, float]:
    """The error rate by the recipes that stand beside the reference's, under their names and versions."""
    references, language = [item.reference or "" for item in items], items[0].language
    return {
        recipe.stamp: metrics.error_rate(references, texts, language, recipe=recipe, samples=0).value
        for recipe in BESIDE
        if recipe.installed
    }


def _unseen(
    metric: Metric, items: Sequence[Item], texts: Sequence[str], seen: Seen, settings: dict[str, Any]
) -> list[Score]:
    """Words that training never had, over the utterances that hold one."""
    found = [(item, text, seen.unseen_words(item)) for item, text in zip(items, texts, strict=True)]
    kept = [(item.reference or "", text, words) for item, text, words in found if words]
    if metric != "error_rate" or not kept:
        return []
    references, hypotheses, words = zip(*kept, strict=True)
    missed, present = metrics.unseen_word_counts(references, hypotheses, items[0].language, words)
    return [ratio_score("unseen_word_error_rate", missed, present, extra={"words": float(sum(present))}, **settings)]


def _mode_confusion(items: Sequence[Item], texts: Sequence[str], settings: dict[str, Any]) -> list[Score]:
    """Voice chats answered as if asked to transcribe, and transcriptions answered as if asked the question."""
    chats, transcripts = [], []
    for item, text in zip(items, texts, strict=True):
        reference, answer = item.reference or "", item.meta.get("answer")
        if item.metric != "error_rate" and item.question is None and item.said and item.task == "voice_chat":
            chats.append(int(metrics.confused(text, reference, item.said, item.language)))
        elif item.metric == "error_rate" and answer:
            transcripts.append(int(metrics.confused(text, reference, answer, item.language)))
    found = (("transcribed_instead", chats), ("answered_instead", transcripts))
    return [proportion(metric, flags, **settings) for metric, flags in found if flags]


def _by_kind(
    metric: Metric, group: Sequence[tuple[Item, str]], seen: Seen, settings: dict[str, Any]
) -> list[tuple[str, Score]]:
    parts: dict[str, list[tuple[Item, str]]] = {}
    for item, text in group:
        if metric == "accuracy" and item.meta.get("kind"):
            parts.setdefault(str(item.meta["kind"]), []).append((item, text))
    if len(parts) < 2:
        return []
    return [
        (kind, _main_score(metric, [item for item, _ in part], [text for _, text in part], seen, settings))
        for kind, part in sorted(parts.items())
    ]
