"""summary.json of a run: its stages, how long they took, and what each left behind on held-out recordings."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.scoring.asked import AS_WRITTEN
from qwen2audio_train.evaluation.scoring.bootstrap import Score
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation, plain
from qwen2audio_train.evaluation.scoring.likelihood import PairScores

FILE = "summary.json"
VERSION = 1
PAIRS = "pairs/1"
"""How pairs are scored: the chosen answer's log-probability against the best of the others."""


class SummaryError(UserError):
    """A summary.json that is not one; the message names the file and the field."""


@dataclass(frozen=True)
class MetricRecord:
    """One held-out score: shares as fractions, BLEU in points; `kind` names a part of the source, "" is all of it.

    `value`, `low` and `high` are None where nothing could be counted; `scoring` and `prompt` are those of a `Row`.
    """

    source: str
    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    language: str | None = None
    kind: str = ""
    extra: Mapping[str, float | None] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    scoring: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class StageRecord:
    """One stage, and the held-out metrics after it.

    Attributes:
        name: `pretrain`, `sft`, `dpo`, or another name for a point that was evaluated.
        wall_s: seconds of training; evaluate_s: seconds of the evaluation after it.
        loss: per source of the held-out set, mean loss per label, token accuracy and number of labels.
        facts: whatever else is worth a line, such as parameters or hours of audio.
    """

    name: str
    wall_s: float
    steps: int
    metrics: tuple[MetricRecord, ...]
    evaluate_s: float = 0.0
    loss: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Showcase:
    """A held-out recording for the report: where it is, what is right, and what each stage decoded."""

    id: str
    source: str
    audio: str
    reference: str
    texts: Mapping[str, str]
    question: str | None = None
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """A whole run."""

    name: str
    wall_s: float
    stages: tuple[StageRecord, ...]
    showcase: tuple[Showcase, ...] = ()
    caveats: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION


def metric_records(evaluation: Evaluation) -> tuple[MetricRecord, ...]:
    """The scores of an evaluation."""
    return tuple(
        replace(
            _record(row.score, row.source, row.task, row.language, row.kind, row.published),
            scoring=row.scoring,
            prompt=row.prompt,
        )
        for row in evaluation.rows
    )


def pair_records(pairs: PairScores, source: str, kind: str = "") -> tuple[MetricRecord, ...]:
    """Accuracy and margin on preference pairs; `kind` says what was heard where it was not the pair's own audio."""
    scores = [pairs.accuracy, pairs.margin]
    for score in (pairs.reward_accuracy, pairs.reward_margin):
        if score is not None:
            scores.append(replace(score, metric=f"reward_{score.metric}"))
    records = (_record(score, source, "preference", kind=kind) for score in scores)
    return tuple(replace(record, scoring=PAIRS, prompt=AS_WRITTEN) for record in records)


def write_summary(summary: RunSummary, folder: str | Path) -> Path:
    """Write summary.json into the run's folder, all of it or nothing."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(plain(dataclasses.asdict(summary)), indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path


def read_summary(folder: str | Path) -> RunSummary:
    """The summary of a run's folder.

    Raises:
        SummaryError: absent, no JSON, of another version, or with fields that are unknown or missing.
    """
    path = Path(folder) / FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SummaryError(f"{path}: no such file; a run writes it when its first stage has been evaluated") from None
    except json.JSONDecodeError as error:
        raise SummaryError(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict) or fields.get("version") != VERSION:
        raise SummaryError(f"{path}: expected version {VERSION}, found {fields.get('version', 'none')}")
    try:
        stages = tuple(
            StageRecord(**{**stage, "metrics": tuple(MetricRecord(**metric) for metric in stage["metrics"])})
            for stage in fields["stages"]
        )
        showcase = tuple(Showcase(**entry) for entry in fields["showcase"])
        return RunSummary(**{**fields, "stages": stages, "showcase": showcase, "caveats": tuple(fields["caveats"])})
    except (TypeError, KeyError) as error:
        raise SummaryError(f"{path}: {error}") from error


def _record(
    score: Score,
    source: str,
    task: str,
    language: str | None = None,
    kind: str = "",
    published: Mapping[str, float] | None = None,
) -> MetricRecord:
    value, low, high = (None if not math.isfinite(x) else x for x in (score.value, score.low, score.high))
    return MetricRecord(
        source, task, score.metric, value, low, high, score.n, language, kind, plain(score.extra), published or {}
    )
