"""Two evaluations of the same held-out examples, utterance by utterance: is the second better, beyond chance?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2audio_train.evaluation.scoring import metrics
from qwen2audio_train.evaluation.scoring.bootstrap import Difference, paired_difference
from qwen2audio_train.evaluation.scoring.items import TASK_METRICS
from qwen2audio_train.evaluation.scoring.normalise import PER_CHARACTER
from qwen2audio_train.evaluation.scoring.table import NAMES, PERCENT, aligned


@dataclass(frozen=True)
class Comparison:
    """Change of an error rate or an accuracy from the first evaluation to the second, over their n common examples."""

    source: str
    task: str
    language: str | None
    metric: str
    n: int
    difference: Difference


def compare(first: str | Path, second: str | Path, *, bootstrap_samples: int = 1000, seed: int = 0) -> list[Comparison]:
    """Compare the texts.jsonl of two evaluation folders, per source, task and language.

    Error rates and accuracies only: BLEU has no counts per utterance that would add up.
    """
    before, after = (_texts(Path(folder) / "texts.jsonl") for folder in (first, second))
    groups: dict[tuple[str, str, str | None], list[str]] = {}
    for name, record in before.items():
        if name in after and record["reference"] is not None and TASK_METRICS.get(record["task"]) != "bleu":
            groups.setdefault((record["source"], record["task"], record["language"]), []).append(name)
    found = []
    for (source, task, language), names in groups.items():
        metric = "accuracy"
        if TASK_METRICS.get(task) == "error_rate":
            metric = "cer" if language in PER_CHARACTER else "wer"
        runs = [_counts([texts[name] for name in names], metric, language) for texts in (before, after)]
        change = paired_difference(runs[0], runs[1], samples=bootstrap_samples, seed=seed)
        found.append(Comparison(source, task, language, metric, len(names), change))
    return found


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """The changes as aligned columns, in percentage points."""
    rows = []
    for c in comparisons:
        unit = 100 if c.metric in PERCENT else 1
        value, low, high = (unit * x for x in (c.difference.value, c.difference.low, c.difference.high))
        cells = [c.source, c.language or "", NAMES.get(c.metric, c.metric), f"{value:+.1f}"]
        rows.append([*cells, f"[{low:+.1f}, {high:+.1f}]", str(c.n), f"{c.difference.p_value:.3f}"])
    return aligned(["source", "lang", "metric", "change", "95 %", "n", "p"], rows, right=(3, 5, 6))


def _counts(records: Sequence[dict[str, Any]], metric: str, language: str | None) -> tuple[list[int], list[int]]:
    references, texts = ([record[key] for record in records] for key in ("reference", "text"))
    if metric == "accuracy":
        return metrics.is_right(references, texts, language=language), [1] * len(records)
    return metrics.edit_counts(references, texts, [language] * len(records))


def _texts(path: Path) -> dict[str, dict[str, Any]]:
    return {record["id"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
