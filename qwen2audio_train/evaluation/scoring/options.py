"""Closed sets by likelihood: which of the possible answers is the likeliest, instead of reading what was written.

The prompt and all answers make one tree, so an item costs its prompt once. The likelihood of an answer is that of its
text and of the token that ends it, so answers of unlike length are compared as they would be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.examples import Example
from qwen2audio_train.evaluation.decoding.lazy_samples import Audio, LazySamples
from qwen2audio_train.evaluation.scoring.benchmarks import LETTERS
from qwen2audio_train.evaluation.scoring.bootstrap import proportion
from qwen2audio_train.evaluation.scoring.items import Item
from qwen2audio_train.evaluation.scoring.likelihood import score_labels
from qwen2audio_train.evaluation.scoring.score import Row, grouped

CLOSED = ("accuracy", "exact_accuracy", "choice", "letter")
MOST_OPTIONS = 64
"""Beyond it a set of answers counts as open."""

STAMP = "label_likelihood/1"


def option_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[Item, Example]],
    recipe: SampleRecipe,
    *,
    audio: Audio = "own",
    tokens_per_batch: int = 8192,
    samples: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """Per closed source, how often the right answer is the likeliest of its options; all ranks call it together.

    The options of an item are its `meta.choices` (for letters, as many letters), or else the references that occur
    among the items of its `meta.kind`.
    """
    examples = {(item.source, item.id): example for item, example in asked}
    rows = []
    for (source, task, language, metric), group in grouped([(item, "") for item, _ in asked]).items():
        items = [item for item, _ in group]
        options = options_of(items)
        if metric not in CLOSED or max(map(len, options)) > MOST_OPTIONS:
            continue
        prompts = LazySamples(
            [examples[item.source, item.id] for item in items],
            tokenizer,
            recipe,
            for_generation=True,
            audio="silence" if audio == "silence" else "own",
            options=options,
        )
        scores = score_labels(model, prompts, tokens_per_batch)
        known = [(i, o, s.logps) for i, o, s in zip(items, options, scores, strict=True) if s is not None]
        right = [int(chosen[int(np.argmax(logps))] == item.reference) for item, chosen, logps in known]
        chance = {"chance": float(np.mean([1 / len(chosen) for _, chosen, _ in known]))} if known else {}
        score = proportion("label_accuracy", right, samples=samples, seed=seed, extra=chance)
        rows.append(Row(source, task, language, "", score, {}, STAMP))
    return rows


def options_of(items: Sequence[Item]) -> list[list[str]]:
    """The possible answers of every item, as they would be written."""
    by_kind: dict[Any, set[str]] = {}
    for item in items:
        by_kind.setdefault(item.meta.get("kind"), set()).add(item.reference or "")
    found = []
    for item in items:
        choices = item.meta.get("choices")
        if item.metric == "letter":
            found.append(list(LETTERS[: len(choices or "ABCD")]))
        else:
            found.append(list(choices or sorted(by_kind[item.meta.get("kind")])))
    return found
