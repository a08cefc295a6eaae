"""What a manifest line becomes: clips, messages and the four forms of an example."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwen2audio_train.families.known import FAMILIES


@dataclass(frozen=True)
class Clip:
    """A piece of audio. `duration_s` is the length of the piece itself, so end_s - start_s where both are given.

    `channel` counts from 0; None is the mean of all channels.
    """

    path: str
    duration_s: float | None
    start_s: float = 0.0
    end_s: float | None = None
    channel: int | None = None


@dataclass(frozen=True)
class Message:
    role: str
    content: tuple[Clip | str, ...]


@dataclass(frozen=True)
class Span:
    """What is heard from `start_s` to `end_s`, in seconds of the clip: a word, an event, a speaker."""

    start_s: float
    end_s: float
    text: str


@dataclass(frozen=True)
class TaskExample:
    """A clip and what is to be said about it; `text_language` is the language of the target (default: as heard).

    `others` are the further clips of a task that compares several. An answer with times has `spans`, and `target` is
    their written form.
    """

    id: str
    clip: Clip
    task: str
    language: str | None
    target: str
    source: str
    text_language: str | None = None
    question: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)
    others: tuple[Clip, ...] = ()
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class ChatExample:
    """A conversation; `mode` is for evaluation only and never changes what the model sees."""

    id: str
    messages: tuple[Message, ...]
    source: str
    mode: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class PreferenceExample:
    """A prompt that ends with a user turn, the preferred answer, and one or more rejected ones."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: tuple[str, ...]
    source: str
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class UnpairedExample:
    """A prompt that ends with a user turn, and one answer to it, which is desirable (`label`) or not."""

    id: str
    prompt: tuple[Message, ...]
    completion: str
    label: bool
    source: str
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)


Example = TaskExample | ChatExample | PreferenceExample | UnpairedExample


_SPECIAL = [re.escape(token) for family in FAMILIES.values() for token in family.special_tokens]
MARK = re.compile(
    "|".join([r"<\|/?(?:audio|image|video)\w*\|>", "</?(?:audio|image|video)>", *_SPECIAL]), re.IGNORECASE
)
NO_MARK = (
    "text alone: a clip is a part of the message, or stands in `audios` beside it (data_manifests/README.md), and the "
    "borders of turns are put there by the chat layout; a tag of markup is written with spaces in it"
)


def mark_in(text: str) -> str | None:
    """What stands in a text for something that is not text, None if nothing does: `<audio>`, `<|AUDIO|>` and their kin
    in other projects, and the special tokens (`<|im_end|>`), which would be learnt as mere characters.
    """
    found = MARK.search(text) if "<" in text else None
    return found.group() if found else None


PAIRED, DESIRABLE, UNDESIRABLE = "preference", "desirable", "undesirable"
PREFERENCE_TASKS = frozenset({PAIRED, DESIRABLE, UNDESIRABLE})


def task_of(example: Example) -> str:
    """The task, or what stands for it: `chat`, `preference`, `desirable` or `undesirable` (an unpaired answer)."""
    if isinstance(example, TaskExample):
        return example.task
    if isinstance(example, UnpairedExample):
        return DESIRABLE if example.label else UNDESIRABLE
    return PAIRED if isinstance(example, PreferenceExample) else "chat"


def clips_of(example: Example) -> tuple[Clip, ...]:
    """The example's clips in the order in which the model hears them."""
    if isinstance(example, TaskExample):
        return (example.clip, *example.others)
    messages = example.messages if isinstance(example, ChatExample) else example.prompt
    return tuple(part for message in messages for part in message.content if isinstance(part, Clip))


def with_clips(example: Example, clips: Sequence[Clip]) -> Example:
    """The same example with other clips, as many and in the same order."""
    if isinstance(example, TaskExample):
        return replace(example, clip=clips[0], others=tuple(clips[1:]))
    rest = iter(clips)
    messages = tuple(
        replace(message, content=tuple(next(rest) if isinstance(part, Clip) else part for part in message.content))
        for message in (example.messages if isinstance(example, ChatExample) else example.prompt)
    )
    if isinstance(example, ChatExample):
        return replace(example, messages=messages)
    return replace(example, prompt=messages)
