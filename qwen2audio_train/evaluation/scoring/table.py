"""Scores as text: aligned columns for a terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from qwen2audio_train.evaluation.scoring.bootstrap import Score

PERCENT = frozenset(
    {
        "wer",
        "cer",
        "accuracy",
        "pair_accuracy",
        "unseen_word_error_rate",
        "transcribed_instead",
        "answered_instead",
        "hallucination",
        "label_accuracy",
    }
)
"""Metrics that are shares."""

NAMES = {
    "wer": "WER",
    "cer": "CER",
    "bleu": "BLEU",
    "unseen_word_error_rate": "unseen words wrong",
    "transcribed_instead": "transcribed instead of answered",
    "answered_instead": "answered instead of transcribed",
    "pair_accuracy": "pair accuracy",
    "hallucination": "words where nobody speaks",
    "judge": "judge's score",
    "chrf": "chrF",
    "cider_d": "CIDEr-D",
    "rouge_l": "ROUGE-L",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "spice": "SPICE",
    "spider": "SPIDEr",
    "map": "mAP",
    "aas_ms": "AAS in ms",
    "label_accuracy": "accuracy by likelihood",
}
"""How a metric is called where people read it; the others by their own names."""


def value_text(metric: str, value: float | None) -> str:
    """A value in its unit: `12.3 %`, `29.6`."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if metric in PERCENT else f"{value:.{_digits(metric)}f}"


def score_text(score: Score) -> tuple[str, str]:
    """Value and interval of a score in its unit: `12.3 %`, `[10.1, 14.8]`."""
    return value_text(score.metric, score.value), interval_text(score.metric, score.low, score.high)


def interval_text(metric: str, low: float | None, high: float | None) -> str:
    """A 95 % interval: `[10.1, 14.8]`."""
    if low is None or high is None or not math.isfinite(low):
        return ""
    factor, digits = (100 if metric in PERCENT else 1), _digits(metric)
    return f"[{factor * low:.{digits}f}, {factor * high:.{digits}f}]"


def _digits(metric: str) -> int:
    return 1 if metric in PERCENT or metric in ("bleu", "chrf", "aas_ms") else 2


def extra_text(score: Score) -> str:
    """What guessing gets, other recipes' figures, and how many answers could not be read."""
    shown = ["chance", "majority", *(name for name in score.extra if "/" in name)]  # other recipes bear a version
    known = [(name, score.extra[name]) for name in shown if name in score.extra]
    texts = [f"{name} {value_text(score.metric, value)}" for name, value in known]
    if unparsed := score.extra.get("unparsed"):
        what = "have no times" if score.metric == "aas_ms" else "name no option"
        texts.append(f"{unparsed:.0f} of {score.n} {what}")
    return ", ".join(texts)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell (Chinese characters count two), those in `right` flush right."""
    cells = [header, *rows]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - _width(cell))
            padded.append(space + cell if column in right else cell + space)
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
