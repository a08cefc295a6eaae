"""Values with their uncertainty: intervals come from resampling utterances.

Percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over counts per utterance, so that an error rate is the
corpus's and two runs on the same utterances can be compared in pairs. n utterances, R draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 1_000_000
"""Numbers drawn in one go: bounds the memory of a bootstrap over many utterances."""


@dataclass(frozen=True)
class Score:
    """A metric over n utterances, with its 95 % interval.

    `value`, `low` and `high` are fractions for error rates and accuracies (so 0.12 is 12 %), points for BLEU; they are
    NaN where nothing could be counted. `extra` holds what belongs beside it, such as the chance level of an accuracy.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """Value of the second run minus that of the first, its 95 % interval, and a two-sided bootstrap p-value."""

    value: float
    low: float
    high: float
    p_value: float


def ratio_score(
    metric: str,
    numerator: Sequence[int] | Counts,
    denominator: Sequence[int] | Counts,
    *,
    samples: int = 1000,
    seed: int = 0,
    extra: dict[str, float] | None = None,
) -> Score:
    """Sum over sum (so an error rate is the corpus's, not the mean of the utterances')."""
    top, bottom = np.asarray(numerator, dtype=np.int64), np.asarray(denominator, dtype=np.int64)
    value = float(_ratio(top.sum(), bottom.sum()))
    draws = [_ratio(counts @ top, counts @ bottom) for counts in _resamples(len(top), samples, seed)]
    low, high = _interval(draws)
    return Score(metric, value, low, high, len(top), extra or {})


def proportion(
    metric: str,
    right: Sequence[int],
    *,
    samples: int = 1000,
    seed: int = 0,
    extra: dict[str, float] | None = None,
) -> Score:
    """Share of utterances of which something is true.

    Where it is true of all or of none every resample is the same: the interval then ends at the exact (Clopper-Pearson)
    limit.
    """
    score = ratio_score(metric, right, [1] * len(right), samples=samples, seed=seed, extra=extra)
    limit = ((1 - CONFIDENCE) / 2) ** (1 / max(1, score.n))
    if score.value == 1.0:
        return replace(score, low=limit)
    return replace(score, high=1 - limit) if score.value == 0.0 else score


def mean_score(
    metric: str, values: Sequence[float] | NDArray[np.float64], *, samples: int = 1000, seed: int = 0
) -> Score:
    """Mean of a number per utterance, such as a margin or a judge's score."""
    table = np.asarray(values, dtype=np.float64)
    draws = [counts @ table / len(table) for counts in _resamples(len(table), samples, seed)]
    low, high = _interval(draws)
    return Score(metric, float(table.mean()) if len(table) else float("nan"), low, high, len(table))


def paired_difference(
    first: tuple[Sequence[int], Sequence[int]],
    second: tuple[Sequence[int], Sequence[int]],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Compare two runs on the same utterances, each given as (numerators, denominators), by paired bootstrap.

    Raises:
        ValueError: the runs do not have the same number of utterances.
    """
    (top_a, bottom_a), (top_b, bottom_b) = (
        [np.asarray(counts, dtype=np.int64) for counts in run] for run in (first, second)
    )
    if len(top_a) != len(top_b):
        raise ValueError(f"the runs have {len(top_a)} and {len(top_b)} utterances; pair them by id first")
    value = float(_ratio(top_b.sum(), bottom_b.sum()) - _ratio(top_a.sum(), bottom_a.sum()))
    draws = [
        _ratio(counts @ top_b, counts @ bottom_b) - _ratio(counts @ top_a, counts @ bottom_a)
        for counts in _resamples(len(top_a), samples, seed)
    ]
    low, high = _interval(draws)
    changes = np.concatenate(draws) if draws else np.zeros(1)
    p_value = 2 * min(float((changes <= 0).mean()), float((changes >= 0).mean()))
    return Difference(value, low, high, min(1.0, p_value))


def resampled_score(
    metric: str, table: NDArray[np.int64], value_of: Callable[[Counts], float], *, samples: int, seed: int
) -> Score:
    """A metric that `value_of` computes from the column sums of a table of counts (n, columns)."""
    value = value_of(table.sum(0)) if len(table) else float("nan")
    draws = [np.array([value_of(row) for row in counts @ table]) for counts in _resamples(len(table), samples, seed)]
    low, high = _interval(draws)
    return Score(metric, value, low, high, len(table))


def weighted_score(
    metric: str, n: int, value_of: Callable[[Counts], float], *, samples: int = 1000, seed: int = 0
) -> Score:
    """A metric that `value_of` computes from how often each of the n utterances counts, (n,)."""
    value = value_of(np.ones(n, dtype=np.int64)) if n else float("nan")
    draws = [np.array([value_of(row) for row in rows]) for rows in _resamples(n, samples, seed)]
    low, high = _interval(draws)
    return Score(metric, value, low, high, n)


def _resamples(n: int, samples: int, seed: int) -> Iterator[Counts]:
    """How often each utterance is drawn, (r, n) at a time, R rows in all; the same for equal (n, samples, seed)."""
    if n == 0:
        return
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // n)
    for start in range(0, samples, rows):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(rows, samples - start))


def _ratio(top: NDArray[np.int64], bottom: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.true_divide(top, bottom))


def _interval(draws: list[NDArray[np.float64]]) -> tuple[float, float]:
    kept = np.concatenate(draws) if draws else np.empty(0)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return float(low), float(high)
