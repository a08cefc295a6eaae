"""The tokenizer of a stage: that of its weights, that of its parts, or one fitted on its text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen2audio_train.config.data import DataConfig, PromptStyle, Timestamps
from qwen2audio_train.config.schema import ConfigError, ModelKind, StageConfig
from qwen2audio_train.data.examples import Example, TaskExample
from qwen2audio_train.data.manifests.cache import find_manifests, good_examples, streamed_examples
from qwen2audio_train.data.manifests.corpus import open_corpus
from qwen2audio_train.data.prompts.pools import language_codes, tag_tokens
from qwen2audio_train.data.prompts.render import Text
from qwen2audio_train.data.prompts.timestamps import timestamp_tokens
from qwen2audio_train.data.prompts.tokenizer import of_family, train_tokenizer
from qwen2audio_train.data.samples.recipe import recipe_of, remote_of, render_as
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.families.family import Family
from qwen2audio_train.families.known import DEFAULT, family_of
from qwen2audio_train.layout import NUM_MEL_BINS
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints.bases import base_of, start_of

MOST_STREAMED = 10_000
"""Examples of a stream that a tokenizer is fitted on."""

TAG = r"<\|[^|]*\|>"
"""Tags of languages and tasks, and most special tokens."""


def build_tokenizer(config: StageConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the weights that the stage starts from, or of the parts that its model is made of.

    A tiny model's is fitted on the training text of the stage. That of parts gets the tags of `prompt_style` and the
    times of `timestamps` that it lacks; finished weights have a vocabulary that stays as it is.
    """
    family = family_of(config.model.family)
    if (start := start_of(config)) is not None:
        return _with_times(load_tokenizer("init_from", base_of(start, check=False)), config.data)
    if config.model.kind is ModelKind.released:
        return _with_times(load_tokenizer("model.path", config.model.path), config.data)
    times = timestamp_tokens() if config.data.timestamps is Timestamps.tokens else ()
    style = config.data.prompt_style
    if config.model.kind is ModelKind.assembled:
        tags = tag_tokens(language_codes(), style) if style is PromptStyle.hierarchical_tags else ()
        return of_family(load_tokenizer("model.language_model", config.model.language_model), family, tags, times)
    examples = list(training_examples(config.data))
    tags = tag_tokens(languages_of(examples, written=style is PromptStyle.hierarchical_tags), style)
    return train_tokenizer(texts_of(examples, config.data, family), config.model.vocab_size, tags, times, family)


def _with_times(tokenizer: Any, data: DataConfig) -> Any:
    """The tokenizer, which has to have times where the recipe writes them as tokens."""
    if data.timestamps is Timestamps.tokens and not set(timestamp_tokens()) <= tokenizer.get_vocab().keys():
        raise ConfigError(
            "data.timestamps=tokens: the tokenizer of these weights has no tokens <|0.00|> to <|30.00|>; set "
            "data.timestamps=text, or begin with model=assembled, whose vocabulary they are added to"
        )
    return tokenizer


def load_tokenizer(key: str, path: str | None) -> Any:
    """The tokenizer of a folder or hub id that the recipe's `key` names. Raises ConfigError when there is none."""
    if path is None:
        raise ConfigError(f"{key}: no value was given; set {key}=... to a folder or hub id")
    try:
        return AutoTokenizer.from_pretrained(folders.weights_folder(path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}={path}: no tokenizer could be loaded from there ({reason})") from error


def languages_of(examples: Iterable[Example], written: bool = False) -> list[str]:
    """Languages that are heard in task examples, and with `written` those of their answers; each has a tag."""
    tasks = [example for example in examples if isinstance(example, TaskExample)]
    found = {example.language for example in tasks} | {example.text_language for example in tasks if written}
    return sorted(language for language in found if language)


def training_examples(data: DataConfig) -> Iterator[Example]:
    """The good lines of the training manifests, the first ones of streams; bad ones are the loader's to count."""
    for name, source in data.sources.items():
        if source.streaming:
            corpus = open_corpus(name, source, remote_of(data))
            yield from islice(streamed_examples(corpus), MOST_STREAMED)
            continue
        yield from good_examples(find_manifests(name, source, remote_of(data), data.num_workers))


def texts_of(examples: Iterable[Example], data: DataConfig, family: Family = DEFAULT) -> Iterator[str]:
    """What is written and asked in the examples, without the special tokens."""
    special = re.compile("|".join([TAG, *map(re.escape, family.special_tokens)]))
    samples = recipe_of(data, NUM_MEL_BINS, family.name)
    for example in examples:
        try:
            rendered = render_as(samples, example)
        except ExampleError:  # the loader's to count, too
            continue
        for piece in (*rendered.trunk, *(piece for branch in rendered.branches for piece in branch)):
            if isinstance(piece, Text):
                yield from filter(None, special.split(piece.text))
