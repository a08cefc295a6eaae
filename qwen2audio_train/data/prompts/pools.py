"""Prompts of the task form: which words, or which tags, ask the model for a target.

The pools are data, one YAML file per family of tasks under pools/ (speech.yaml describes the format); a task
exists because it has a pool. Two styles: `natural` prompts, as in Qwen2-Audio, and the `hierarchical_tags` of
Qwen-Audio (arXiv:2311.07919), so that the choice between them is one setting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from string import Formatter
from typing import Any

import yaml

from qwen2audio_train.config.data import PromptStyle

PLACEHOLDERS = ("language", "language_name", "text_language", "text_language_name", "question")


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt with placeholders, and what the answer starts with (learnt in training, given in evaluation)."""

    prompt: str
    answer_prefix: str = ""

    @cached_property
    def fields(self) -> frozenset[str]:
        """Fields of the example that the template names."""
        return _placeholders(self.prompt) | _placeholders(self.answer_prefix)


@dataclass(frozen=True)
class Pool:
    """All prompts of one task.

    Attributes:
        about: what the task is, in a few words.
        prompts: natural ones; evaluation uses the first.
        tags: `start`, `task` and `instruction` of the hierarchical form.
        needs: fields that every prompt needs.
        clips: how many recordings an example has.
        metric: how its answers are scored, by name.
        asks_language: the answer is the language, which the tags then do not tell.
    """

    about: str
    prompts: tuple[PromptTemplate, ...]
    tags: Mapping[str, str]
    needs: tuple[str, ...] = ()
    clips: int = 1
    metric: str = "accuracy"
    asks_language: bool = False


def task_names() -> tuple[str, ...]:
    """All tasks, in the order of the pools."""
    return tuple(_pools())


def describe_tasks() -> dict[str, str]:
    """Every task with the few words that say what it is."""
    return {name: pool.about for name, pool in _pools().items()}


def missing_fields(task: str, example: Any) -> list[str]:
    """Fields that the task cannot do without and that the example lacks."""
    return [name for name in _pools()[task].needs if not getattr(example, name)]


def num_clips(task: str) -> int:
    """How many recordings an example of the task has: one, or as many as it compares."""
    return _pools()[task].clips


def metric_names() -> dict[str, str]:
    """The metric of every task, by name."""
    return {name: pool.metric for name, pool in _pools().items()}


def choose_prompt(example: Any, style: PromptStyle, seed: int, most: int | None = None) -> PromptTemplate:
    """The template for a TaskExample: a pure function of (seed, id), out of those that fit."""
    fitting = fitting_prompts(example, style, most)
    digest = hashlib.blake2b(f"{seed}/{example.id}".encode(), digest_size=8).digest()
    return fitting[int.from_bytes(digest, "big") % len(fitting)]


def fitting_prompts(example: Any, style: PromptStyle, most: int | None = None) -> list[PromptTemplate]:
    """The templates for a TaskExample: the first `most` that fit, or all; of tags there is one.

    A template fits when the example has every field that it names. `text_language` defaults to `language` for ASR-like
    tasks and to English otherwise, so it is always there unless the task needs it said.
    """
    if style == PromptStyle.hierarchical_tags:
        return [_tag_template(example)]
    available = prompt_fields(example)
    return [template for template in _pools()[example.task].prompts if template.fields <= available.keys()][:most]


def prompt_fields(example: Any) -> dict[str, str]:
    """What the placeholders stand for in this example."""
    text_language = example.text_language or "en"
    fields = {"text_language": text_language, "text_language_name": language_name(text_language)}
    if example.language is not None:
        fields |= {"language": example.language, "language_name": language_name(example.language)}
    if example.question is not None:
        fields["question"] = example.question
    return fields


def language_name(code: str) -> str:
    """English name of a language code; a code without a known name stands for itself."""
    return _languages().get(code, code)


def language_codes() -> tuple[str, ...]:
    """Codes of the languages that have a name here."""
    return tuple(_languages())


def tag_tokens(languages: Iterable[str], style: PromptStyle) -> list[str]:
    """Tags that the prompts of a style may hold, for a tokenizer that is to have them as tokens of their own.

    Times (`timestamps.timestamp_tokens`) are no tags: they are part of an answer.
    """
    tags = [f"<|{language}|>" for language in languages]
    if style == PromptStyle.natural:
        return tags
    parts = [value for pool in _pools().values() for value in pool.tags.values()]
    fixed = ["en", "unknown", "answer", "notimestamps", "timestamps", *parts]
    return list(dict.fromkeys([*tags, *(f"<|{name}|>" for name in fixed)]))


def _tag_template(example: Any) -> PromptTemplate:
    """Qwen-Audio's order: start, audio language, task, text language, timestamps, output instruction."""
    pool = _pools()[example.task]
    tags = pool.tags
    heard = "unknown" if pool.asks_language else example.language or "unknown"
    transcribes = tags["task"] == "transcribe"
    written = example.text_language or (heard if transcribes else "en")
    task = "<|question|>{question}<|answer|>" if tags["task"] == "question" else f"<|{tags['task']}|>"
    timestamps = "timestamps" if example.spans else "notimestamps"
    prompt = f"<|{tags['start']}|><|{heard}|>{task}<|{written}|><|{timestamps}|><|{tags['instruction']}|>"
    return PromptTemplate(prompt)


def _placeholders(text: str) -> frozenset[str]:
    return frozenset(name for _, name, _, _ in Formatter().parse(text) if name)


@cache
def _languages() -> dict[str, str]:
    return {str(code): name for code, name in _load("languages.yaml").items()}


@cache
def _pools() -> dict[str, Pool]:
    pools: dict[str, Pool] = {}
    for name in ("speech.yaml", "sound.yaml", "music.yaml"):
        for task, entry in _load(name).items():
            prompts = tuple(
                PromptTemplate(**item) if isinstance(item, dict) else PromptTemplate(item) for item in entry["prompts"]
            )
            pools[task] = Pool(**{**entry, "prompts": prompts, "needs": tuple(entry.get("needs", ()))})
    return pools


def _load(name: str) -> dict[str, Any]:
    text = (files(__package__) / "pools" / name).read_text(encoding="utf-8")
    return yaml.safe_load(text)
