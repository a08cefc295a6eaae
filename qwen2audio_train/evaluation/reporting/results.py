"""Evaluation folders read back: their scores, and their texts utterance by utterance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.storage.files import json_lines
from qwen2audio_train.evaluation.scoring.bootstrap import Score
from qwen2audio_train.evaluation.scoring.items import Item
from qwen2audio_train.evaluation.scoring.normalise import normalise
from qwen2audio_train.evaluation.scoring.score import Row, counts_of, grouped

METRICS, TEXTS = "metrics.json", "texts.jsonl"
LENGTHS_S = (2.0, 5.0, 10.0, 20.0, 30.0)
"""Borders of the classes of clip length that errors are broken down by."""

MAX_LABELS = 30
"""Closed sets up to this size get a confusion matrix."""


@dataclass(frozen=True)
class Utterance:
    """One held-out example with what was decoded.

    Attributes:
        wrong: errors, or 1 for a wrong answer; out_of: reference length, or 1.
    """

    item: Item
    text: str
    clips: tuple[Clip, ...]
    wrong: int
    out_of: int

    @property
    def rate(self) -> float:
        return self.wrong / max(1, self.out_of)


@dataclass(frozen=True)
class Result:
    """One evaluation under the name that tables give it."""

    name: str
    rows: tuple[Row, ...]
    utterances: Mapping[tuple[str, str, str | None], tuple[Utterance, ...]]
    caveats: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_result(name: str, folder: str | Path) -> Result:
    """The evaluation that launch/evaluate.py wrote into `folder`.

    Raises:
        ConfigError: there is none, or it is of a version that cannot be read.
    """
    folder = Path(folder)
    for file in (METRICS, TEXTS):
        if not (folder / file).is_file():
            raise ConfigError(f"{folder}: no {file} here; name the output_dir of an evaluation (launch/evaluate.py)")
    try:
        saved = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        rows = tuple(Row(**{**row, "score": _score(row["score"])}) for row in saved["rows"])
        utterances = _utterances(folder / TEXTS)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{folder}: {METRICS} or {TEXTS} cannot be read ({error}); evaluate again") from error
    return Result(name, rows, utterances, tuple(saved["caveats"]), saved["settings"])


def read_texts(path: Path) -> Iterator[tuple[Item, str, tuple[Clip, ...]]]:
    """Items, texts and clips of a texts.jsonl."""
    for record in json_lines(path):
        text, clips = record.pop("text"), record.pop("clips", ())
        yield Item(**record), text, tuple(Clip(**clip) for clip in clips)


def _score(fields: Mapping[str, Any]) -> Score:
    """A score from its JSON, which has null for what is no number."""
    numbers = {name: float("nan") if fields[name] is None else fields[name] for name in ("value", "low", "high")}
    return Score(**{**fields, **numbers})


def _utterances(path: Path) -> dict[tuple[str, str, str | None], tuple[Utterance, ...]]:
    clips, decoded = {}, []
    for item, text, heard in read_texts(path):
        clips[item.source, item.id] = heard
        decoded.append((item, text))
    found = {}
    for (source, task, language, metric), group in grouped(decoded).items():
        items, texts = [item for item, _ in group], [text for _, text in group]
        counted = counts_of(metric, items, texts)
        if counted is None:
            continue
        is_rate = metric in ("error_rate", "hallucination", "timestamps", "diarization_error_rate")
        found[source, task, language] = tuple(
            Utterance(item, text, clips[source, item.id], count if is_rate else whole - count, whole)
            for item, text, count, whole in zip(items, texts, *counted, strict=True)
        )
    return found


def worst(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """The utterances with most errors, and of equally many those with the higher rate; none that are right."""
    wrong = [utterance for utterance in utterances if utterance.wrong]
    return sorted(wrong, key=lambda u: (-u.wrong, -u.rate, u.item.id))[:count]


def breakdown(utterances: Sequence[Utterance]) -> dict[str, dict[str, tuple[float, int]]]:
    """Error rate and number of utterances by clip length, and by the speaker that `meta` names."""
    parts: dict[str, dict[str, list[Utterance]]] = {"length": {}, "speaker": {}}
    for utterance in utterances:
        seconds = [clip.duration_s for clip in utterance.clips if clip.duration_s is not None]
        if seconds:
            parts["length"].setdefault(_length_class(sum(seconds)), []).append(utterance)
        if "speaker" in utterance.item.meta:
            parts["speaker"].setdefault(str(utterance.item.meta["speaker"]), []).append(utterance)
    return {
        kind: {
            name: (sum(u.wrong for u in group) / max(1, sum(u.out_of for u in group)), len(group))
            for name, group in sorted(groups.items())
        }
        for kind, groups in parts.items()
        if len(groups) > 1
    }


def _length_class(seconds: float) -> str:
    """`02 to 05 s`: sorts as it counts."""
    lower = max((border for border in (0.0, *LENGTHS_S) if border <= seconds), default=0.0)
    upper = min((border for border in LENGTHS_S if border > seconds), default=None)
    return f"over {lower:02.0f} s" if upper is None else f"{lower:02.0f} to {upper:02.0f} s"


def confusion(utterances: Sequence[Utterance]) -> tuple[list[str], list[list[int]]] | None:
    """Labels and counts [right label][answer] of a closed set, last those that are no label; None for open answers."""
    if not utterances or utterances[0].item.metric not in ("accuracy", "exact_accuracy"):
        return None
    right = [normalise(u.item.reference or "", u.item.language) for u in utterances]
    labels = sorted(set(right))
    if not 1 < len(labels) <= MAX_LABELS or len(labels) > len(utterances) / 2:
        return None
    said = [normalise(u.text, u.item.language) for u in utterances]
    known = set(labels)
    counts = Counter(zip(right, (text if text in known else "" for text in said), strict=True))
    return labels, [[counts[wanted, answer] for answer in (*labels, "")] for wanted in labels]
