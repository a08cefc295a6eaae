"""Can a pair be told apart without listening? Counts and a text-only classifier over the answers of a pair set."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2audio_train.data.examples import PreferenceExample

NUM_FEATURES = 4096
MAX_NGRAM = 3
NUM_FOLDS = 5
MAX_PAIRS = 4000
RIDGE = 1.0


@dataclass(frozen=True)
class Balance:
    """What the answers of a pair set give away.

    Attributes:
        num_pairs: an example with several rejected answers counts as so many.
        longer_chosen: share of pairs (without ties) whose chosen answer is the longer one; 0.5 is even.
        text_only_accuracy: share of held-out pairs that a classifier on the answers' character n-grams gets right;
            NaN for fewer than 20 pairs. Well above 0.5, preference training can succeed without listening.
        swapped: whether the chosen and the rejected answers are the same texts, equally often.
    """

    num_pairs: int
    longer_chosen: float
    text_only_accuracy: float
    swapped: bool


def balance(examples: Iterable[PreferenceExample]) -> Balance:
    """Measure a pair set."""
    pairs = [(example.chosen, rejected) for example in examples for rejected in example.rejected]
    longer = [len(chosen) > len(rejected) for chosen, rejected in pairs if len(chosen) != len(rejected)]
    return Balance(
        num_pairs=len(pairs),
        longer_chosen=float(np.mean(longer)) if longer else 0.5,
        text_only_accuracy=text_only_accuracy(pairs),
        swapped=Counter(chosen for chosen, _ in pairs) == Counter(rejected for _, rejected in pairs),
    )


def text_only_accuracy(pairs: Sequence[tuple[str, str]], seed: int = 0) -> float:
    """Cross-validated accuracy of ridge regression on differences of hashed n-gram counts.

    Pairs of the same two texts stay in the same fold, whichever of them is chosen. Of more than `MAX_PAIRS` pairs a
    random choice is taken.
    """
    if len(pairs) < 20:
        return float("nan")
    rng = np.random.default_rng(seed)
    kept = [pairs[index] for index in rng.permutation(len(pairs))[:MAX_PAIRS]]
    features = np.stack([_ngrams(chosen) - _ngrams(rejected) for chosen, rejected in kept])
    folds: dict[frozenset[str], int] = {}
    fold = np.array([folds.setdefault(frozenset(texts), len(folds)) % NUM_FOLDS for texts in kept])
    right: list[float] = []
    for held_out in range(NUM_FOLDS):
        train, test = features[fold != held_out], features[fold == held_out]
        if len(test):
            # By symmetry (a before b is minus b before a) the regression has no intercept and targets of one.
            weights = train.T @ np.linalg.solve(train @ train.T + RIDGE * np.eye(len(train)), np.ones(len(train)))
            score = test @ weights
            right += np.where(np.abs(score) < 1e-9, 0.5, score > 0).tolist()
    return float(np.mean(right))


def _ngrams(text: str) -> NDArray[np.float64]:
    counts = np.zeros(NUM_FEATURES)
    padded = f"^{text}$"
    for n in range(1, MAX_NGRAM + 1):
        for start in range(len(padded) - n + 1):
            counts[zlib.crc32(padded[start : start + n].encode()) % NUM_FEATURES] += 1.0
    return counts
