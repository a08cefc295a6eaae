"""Several labels for one recording: mean average precision over classes (mAP).

Average precision of a class is the sum of (R_k - R_k-1) P_k over the thresholds of its scores, ties together, as in
scikit-learn's `average_precision_score`; the mean is over the classes that some reference has. n recordings, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2audio_train.evaluation.scoring.bootstrap import Counts, Score, weighted_score
from qwen2audio_train.evaluation.scoring.normalise import normalise

Table = NDArray[np.float64]


def label_table(texts: Sequence[str], classes: Sequence[str]) -> Table:
    """1 where a text, labels separated by commas, names a class, else 0: (n, C)."""
    named = [{normalise(label, None) for label in text.split(",")} for text in texts]
    return np.array([[float(normalise(c, None) in labels) for c in classes] for labels in named]).reshape(
        len(texts), len(classes)
    )


def mean_average_precision(relevant: Table, scores: Table, *, samples: int = 1000, seed: int = 0) -> Score:
    """mAP of scores (n, C) against labels (n, C) of 0 and 1; scores of 0 and 1 are answers that named a class."""
    kept = relevant.any(axis=0)

    def value_of(weights: Counts) -> float:
        columns = zip(relevant.T[kept], scores.T[kept], strict=True)
        found = np.array([average_precision(truth, score, weights) for truth, score in columns])
        return float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")

    return weighted_score("map", len(relevant), value_of, samples=samples, seed=seed)


def average_precision(
    relevant: NDArray[np.float64], scores: NDArray[np.float64], weights: NDArray[np.int64] | None = None
) -> float:
    """Average precision of one class, (n,) each; `weights` says how often each recording counts."""
    order = np.argsort(-scores, kind="stable")
    counts = (np.ones(len(scores)) if weights is None else weights)[order]
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    found = (relevant[order] * counts).cumsum()[last_of_tie]
    ranked = counts.cumsum()[last_of_tie]
    if not found[-1]:
        return float("nan")
    precision = np.divide(found, ranked, out=np.zeros_like(found, dtype=float), where=ranked > 0)
    return float((np.diff(found, prepend=0.0) * precision).sum() / found[-1])
