"""Held-out evaluation: decode, score per source, task and language, and say what the numbers mean.

result = evaluate(model, tokenizer, examples, options, train_examples=train)
print(table(result.rows))
save(result, folder)            # metrics.json, table.txt, texts.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import Example, PreferenceExample, UnpairedExample
from qwen2audio_train.data.samples.recipe import plain as plain_recipe
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import GREEDY, Decoding, generate_texts
from qwen2audio_train.evaluation.decoding.lazy_samples import Audio, LazySamples
from qwen2audio_train.evaluation.scoring import metrics
from qwen2audio_train.evaluation.scoring.benchmarks import benchmarks
from qwen2audio_train.evaluation.scoring.bootstrap import Score, proportion, ratio_score
from qwen2audio_train.evaluation.scoring.items import Item, Seen, item_of
from qwen2audio_train.evaluation.scoring.likelihood import PairScores, held_out_loss, score_labels
from qwen2audio_train.evaluation.scoring.normalise import caveats, normalise
from qwen2audio_train.evaluation.scoring.table import NAMES, aligned, extra_text, interval_text, value_text


@dataclass(frozen=True)
class Row:
    """One score; `kind` names a part of the source, "" is all of it. `published` are other people's figures for it."""

    source: str
    task: str
    language: str | None
    kind: str
    score: Score
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        rows: scores, sources in their order.
        loss: per source, mean teacher-forced loss per label, token accuracy, and number of labels.
        texts: per example what was asked for and what was decoded.
        failed: ids of the examples that are in no score, with the reason.
        caveats: what keeps the numbers from being exactly comparable with others'.
        settings: how it was asked and decoded.
    """

    rows: tuple[Row, ...]
    loss: dict[str, dict[str, float]]
    texts: tuple[dict[str, Any], ...]
    failed: dict[str, str]
    caveats: tuple[str, ...]
    settings: dict[str, Any]
    wall_s: float


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    recipe: SampleRecipe,
    *,
    decoding: Decoding = GREEDY,
    train_examples: Iterable[Example] = (),
    audio: Audio = "own",
    bootstrap_samples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Decode every example greedily and score it; on several ranks each does its share and all get the result.

    Args:
        examples: task and chat examples (preferences are for `score_pairs`). A chat is answered at its last turn,
            with the earlier turns as they are written.
        train_examples: they tell which words were never seen and which answer a deaf model would give.
        audio: "silence" or "swapped" ask what is left without the right audio.

    Raises:
        ValueError: a preference among the examples.
        MissingLibraryError: a score would need a library that is not installed.
    """
    started = time.perf_counter()
    if any(isinstance(example, PreferenceExample | UnpairedExample) for example in examples):
        raise UserError("preference examples have no single right answer: score them with score_pairs")
    prompts = LazySamples(examples, tokenizer, recipe, for_generation=True, audio=audio, seed=seed)
    items = [item for item in map(item_of, prompts.examples) if item is not None]
    texts = generate_texts(model, tokenizer, prompts, decoding, prompts.lengths)
    learnable = [e for e, item in zip(prompts.examples, items, strict=True) if item.reference is not None]
    whole = LazySamples(learnable, tokenizer, recipe, for_generation=False)
    loss = held_out_loss(learnable, score_labels(model, tokenizer, whole, decoding.tokens_per_batch))
    decoded = [(item, text) for item, text in zip(items, texts, strict=True) if text is not None]
    rows = score_texts(decoded, Seen.of(train_examples), bootstrap_samples=bootstrap_samples, seed=seed)
    return Evaluation(
        rows=tuple(rows),
        loss=loss,
        texts=tuple(_text_record(item, text) for item, text in decoded),
        failed={prompts.examples[index].id: reason for index, reason in sorted(prompts.failed.items())},
        caveats=tuple(caveats(item.language for item in items if item.metric == "error_rate")),
        settings={"audio": audio, "seed": seed, **dataclasses.asdict(decoding), "sample": plain_recipe(recipe)},
        wall_s=time.perf_counter() - started,
    )


def score_texts(
    decoded: Sequence[tuple[Item, str]], seen: Seen, *, bootstrap_samples: int = 1000, seed: int = 0
) -> list[Row]:
    """Scores of decoded texts, grouped by source, task, language and metric."""
    groups: dict[tuple[str, str, str | None, str | None], list[tuple[Item, str]]] = {}
    for item, text in decoded:
        if item.reference is not None and item.metric not in (None, "judge"):
            groups.setdefault((item.source, item.task, item.language, item.metric), []).append((item, text))
    settings: dict[str, Any] = {"samples": bootstrap_samples, "seed": seed}
    rows = []
    for (source, task, language, _), group in groups.items():
        known = benchmarks().get(source)
        published = dict(known.published) if known else {}
        main, *others = _score_group(group, seen, settings)
        rows.append(Row(source, task, language, "", main, published))
        rows += [Row(source, task, language, "", score) for score in others]
        rows += [Row(source, task, language, kind, score) for kind, score in _by_kind(group, seen, settings)]
    return rows


def _score_group(group: Sequence[tuple[Item, str]], seen: Seen, settings: dict[str, Any]) -> list[Score]:
    items, texts = [item for item, _ in group], [text for _, text in group]
    references, language, metric = [item.reference or "" for item in items], items[0].language, items[0].metric
    if metric == "error_rate":
        scores = [metrics.error_rate(references, texts, language, **settings), *_unseen(items, texts, seen, settings)]
    elif metric == "hallucination":
        scores = [metrics.hallucination(references, texts, language, **settings)]
    elif metric == "bleu":
        scores = [metrics.bleu(references, texts, items[0].text_language, **settings)]
    elif metric == "choice":
        scores = [_multiple_choice(items, texts, settings)]
    elif metric == "letter":
        scores = [_letters(items, texts, settings)]
    else:
        by_kind: dict[Any, set[str]] = {}
        for item, reference in zip(items, references, strict=True):
            by_kind.setdefault(item.meta.get("kind"), set()).add(normalise(reference, language))
        scores = [
            metrics.accuracy(
                references,
                texts,
                language=language,
                exact=metric == "exact_accuracy",
                choices=[item.meta.get("choices") or sorted(by_kind[item.meta.get("kind")]) for item in items],
                majority=seen.majority(items),
                **settings,
            )
        ]
    return scores + _mode_confusion(items, texts, settings)


def _unseen(items: Sequence[Item], texts: Sequence[str], seen: Seen, settings: dict[str, Any]) -> list[Score]:
    """Words that training never had, over the utterances that hold one."""
    found = [(item, text, seen.unseen_words(item)) for item, text in zip(items, texts, strict=True)]
    kept = [(item.reference or "", text, words) for item, text, words in found if words]
    if not kept:
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


def _by_kind(group: Sequence[tuple[Item, str]], seen: Seen, settings: dict[str, Any]) -> list[tuple[str, Score]]:
    parts: dict[str, list[tuple[Item, str]]] = {}
    for item, text in group:
        if item.metric == "accuracy" and item.meta.get("kind"):
            parts.setdefault(str(item.meta["kind"]), []).append((item, text))
    if len(parts) < 2:
        return []
    return [(kind, _score_group(part, seen, settings)[0]) for kind, part in sorted(parts.items())]


def _multiple_choice(items: Sequence[Item], texts: Sequence[str], settings: dict[str, Any]) -> Score:
    choices = [item.meta.get("choices", ()) for item in items]
    right = [
        int(metrics.chose_answer(item.reference or "", text, options))
        for item, text, options in zip(items, texts, choices, strict=True)
    ]
    extra = {"chance": sum(1 / max(1, len(options)) for options in choices) / len(items)}
    return proportion("accuracy", right, extra=extra, **settings)


def _letters(items: Sequence[Item], texts: Sequence[str], settings: dict[str, Any]) -> Score:
    said = [metrics.chosen_letter(text) for text in texts]
    right = [int(letter == item.reference) for letter, item in zip(said, items, strict=True)]
    extra = {
        "chance": sum(1 / max(1, len(item.meta.get("choices", ()))) for item in items) / len(items),
        "unparsed": float(sum(letter is None for letter in said)),
    }
    return proportion("accuracy", right, extra=extra, **settings)


def _text_record(item: Item, text: str) -> dict[str, Any]:
    fields = {"id": item.id, "source": item.source, "task": item.task, "language": item.language}
    asked = {"question": item.question, "reference": item.reference}
    return {**fields, **asked, "text": text, "meta": dict(item.meta)}


def save(result: Evaluation, folder: str | Path) -> None:
    """Write metrics.json, table.txt and texts.jsonl."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = {name: value for name, value in dataclasses.asdict(result).items() if name != "texts"}
    (folder / "metrics.json").write_text(json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n")
    lines = [table(result.rows), *(f"note: {caveat}" for caveat in result.caveats)]
    lines += [f"left out: {name}: {reason}" for name, reason in result.failed.items()]
    (folder / "table.txt").write_text("\n".join(lines) + "\n")
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(plain(record), ensure_ascii=False) + "\n" for record in result.texts)


def save_pairs(scores: Mapping[str, PairScores], folder: str | Path) -> None:
    """Write pairs.json: scores of held-out pairs by what the model heard (`own`, `swapped`, `silence`)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = {audio: dataclasses.asdict(score) for audio, score in scores.items()}
    (folder / "pairs.json").write_text(json.dumps(plain(report), indent=1) + "\n")


def plain(value: Any) -> Any:
    """`value` as JSON has it: numbers that are none become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Row]) -> str:
    """The scores as aligned columns, parts of a source indented below it."""
    cells = []
    for row in rows:
        score = row.score
        published = ", ".join(f"{who} {value_text(score.metric, value)}" for who, value in row.published.items())
        cells.append(
            [
                f"  {row.kind}" if row.kind else row.source,
                row.task,
                row.language or "",
                NAMES.get(score.metric, score.metric),
                value_text(score.metric, score.value),
                interval_text(score.metric, score.low, score.high),
                str(score.n),
                extra_text(score),
                published,
            ]
        )
    header = ["source", "task", "lang", "metric", "value", "95 %", "n", "guessing", "published"]
    return aligned(header, cells, right=(4, 6))
