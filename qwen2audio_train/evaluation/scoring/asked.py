"""How an example was asked, as a stamp that a number bears."""

from __future__ import annotations

import hashlib

from qwen2audio_train.config.data import PromptStyle, SampleRecipe
from qwen2audio_train.data.examples import Example, TaskExample
from qwen2audio_train.data.prompts.pools import choose_prompt
from qwen2audio_train.evaluation.scoring.benchmarks import benchmarks

AS_WRITTEN = "as written"
"""Stamp of a chat, whose manifest holds the words that it is asked in."""


def asked_by(example: Example, recipe: SampleRecipe = SampleRecipe()) -> str:
    """A benchmark's own prompt by its name and version; `as written` for a chat.

    Another task by its name and the first six digits of its prompt's SHA-256 (`asr/1f3a9c`), so that another wording is
    another stamp; where the style is not the natural one it stands in the task's place (`tags/...`).
    """
    known = benchmarks().get(example.source)
    if not isinstance(example, TaskExample):
        return known.stamp if known else AS_WRITTEN
    natural = recipe.prompt_style is PromptStyle.natural
    if known and natural:
        return known.stamp
    template = choose_prompt(example, recipe.prompt_style, recipe.prompt_seed, 1)
    digest = hashlib.sha256(f"{template.prompt}|{template.answer_prefix}".encode()).hexdigest()[:6]
    return f"{example.task if natural else recipe.prompt_style.value}/{digest}"
