"""Held-out examples decoded and scored at every evaluation of pre-training and fine-tuning."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.decoded import DecodedConfig
from qwen2audio_train.config.schema import ConfigError, StageConfig
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.samples.recipe import recipe_of
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.evaluation.decoding.ranks import gather, rank_and_world
from qwen2audio_train.evaluation.scoring.evaluate import Evaluation, evaluate, save

MEASURED = 16
"""Examples that are decoded first, to learn how many fit into the budget."""

FOLDER = "decoded"


class HeldOutDecoding:
    """Decodes and scores held-out examples with the model of a trainer; all ranks call it together.

    Attributes:
        figures: patterns of the names of what it returns.
        fitting: examples that are taken; None until the first evaluation has measured it.
    """

    def __init__(
        self,
        config: DecodedConfig,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        samples: SampleRecipe,
        folder: Path,
    ) -> None:
        self.config, self.tokenizer, self.samples, self.folder = config, tokenizer, samples, folder
        self.examples = in_turn(examples)
        self.fitting = None if config.budget_s else len(self.examples)
        self.decoding = Decoding(max_new_tokens=config.max_new_tokens, tokens_per_batch=config.tokens_per_batch)
        self.figures = ["decoded/examples", *sorted({f"decoded/*/{example.source}" for example in examples})]

    def __call__(self, trainer: Any) -> dict[str, float]:
        if self.fitting is None:
            self.fitting = self._measured(trainer.model)
        found = self._evaluated(trainer.model, self.fitting)
        if rank_and_world()[0] == 0:
            save(found, self.folder / f"step-{trainer.state.global_step}")
        figures = {f"decoded/{row.score.metric}/{row.source}": row.score.value for row in found.rows if not row.kind}
        return {"decoded/examples": float(self.fitting), **figures}

    def _measured(self, model: Any) -> int:
        """How many examples fit into the budget, by the slowest rank's time for the first of them; at least these."""
        started = time.perf_counter()
        first = min(MEASURED, len(self.examples))
        self._evaluated(model, first)
        took = max(gather({rank_and_world()[0]: time.perf_counter() - started}).values())
        return max(first, min(len(self.examples), int(first * self.config.budget_s / took)))

    def _evaluated(self, model: Any, count: int) -> Evaluation:
        some = self.examples[:count]
        return evaluate(model, self.tokenizer, some, self.samples, decoding=self.decoding, bootstrap_samples=0)


def held_out_decoding(config: StageConfig, tokenizer: PreTrainedTokenizerBase) -> HeldOutDecoding | None:
    """What `decoded` of the recipe asks for; None where it names no manifest.

    Raises:
        ConfigError: a manifest is not there, or empty.
    """
    chosen = config.decoded
    if not chosen.manifests:
        return None
    examples: list[Example] = []
    for name, path in chosen.manifests.items():
        if not Path(path).is_file():
            raise ConfigError(f"decoded.manifests.{name}={path}: no such file")
        examples += read_manifest(path)
    samples = recipe_of(config.data, config.model.num_mel_bins, config.model.family)
    folder = Path(config.run_dir) / FOLDER
    return HeldOutDecoding(chosen, some_of_each(examples, chosen.max_examples), tokenizer, samples, folder)


def some_of_each(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` examples of every source, evenly from the whole of it, or all of them for 0."""
    if not count:
        return list(examples)
    return [
        group[place * len(group) // min(count, len(group))]
        for group in by_source(examples)
        for place in range(min(count, len(group)))
    ]


def in_turn(examples: Sequence[Example]) -> list[Example]:
    """The examples with the sources taking turns, so that the first n are of all of them."""
    turns = zip_longest(*by_source(examples))
    return [example for example in chain.from_iterable(turns) if example is not None]


def by_source(examples: Sequence[Example]) -> list[list[Example]]:
    sources: dict[str, list[Example]] = {}
    for example in examples:
        sources.setdefault(example.source, []).append(example)
    return list(sources.values())
