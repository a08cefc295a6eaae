"""What a pair is made for: a prompt with audio, and, where there is one, the answer that is known to be right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2audio_train.data.examples import (
    ChatExample,
    Clip,
    Example,
    Message,
    PreferenceExample,
    TaskExample,
    UnpairedExample,
    clips_of,
)
from qwen2audio_train.data.tools.chat import written_question


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a user turn.

    Attributes:
        reference: the right answer, if it is known.
        task, language: of the task form, or from a chat's `meta`; the language is the answer's.
        description: what is in the audio, in words, for a judge that cannot hear it (`meta.description` or
            `meta.said`).
        choices: options of a closed question (`meta.choices`).
    """

    id: str
    prompt: tuple[Message, ...]
    reference: str | None
    task: str | None
    language: str | None
    source: str
    description: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def clips(self) -> tuple[Clip, ...]:
        return tuple(part for message in self.prompt for part in message.content if isinstance(part, Clip))

    @property
    def text(self) -> str:
        """What is written in the prompt, without the audio."""
        return "\n".join(part for message in self.prompt for part in message.content if isinstance(part, str))

    def as_example(self) -> ChatExample:
        """The prompt alone, to be answered."""
        return ChatExample(self.id, self.prompt, self.source)


def questions_of(examples: Iterable[Example], prompt_seed: int = 0) -> list[Question]:
    """The questions in a manifest; a task example is put in a user turn with a prompt of its pool."""
    return [_question(example, prompt_seed) for example in examples]


def pair(
    question: Question,
    chosen: str,
    rejected: Sequence[str],
    made_by: dict[str, Any],
    *,
    name: str = "",
    prompt: tuple[Message, ...] | None = None,
) -> PreferenceExample:
    """A preference example whose `meta` says how it was made.

    Args:
        made_by: provenance; the question's id is added.
        name: ending of the id, where a question gives several pairs.
        prompt: instead of the question's own.
    """
    meta = {"task": question.task, "language": question.language}
    known: dict[str, Any] = {key: value for key, value in meta.items() if value is not None}
    known["pair"] = {"question": question.id, **made_by}
    identity = f"{question.id}:{name}" if name else question.id
    return PreferenceExample(identity, prompt or question.prompt, chosen, tuple(rejected), question.source, known)


def _question(example: Example, prompt_seed: int) -> Question:
    if isinstance(example, TaskExample):
        asked: tuple[Clip | str, ...] = (*clips_of(example), written_question(example, prompt_seed))
        prompt: tuple[Message, ...] = (Message("user", asked),)
        reference: str | None = example.target
        task: str | None = example.task
        language = example.text_language or example.language
    else:
        prompt, reference = _prompt_and_answer(example)
        task = example.meta.get("task")
        language = example.meta.get("text_language") or example.meta.get("language")
    choices = tuple(map(str, example.meta.get("choices", ())))
    return Question(example.id, prompt, reference, task, language, example.source, _description(example), choices)


def _prompt_and_answer(
    example: ChatExample | PreferenceExample | UnpairedExample,
) -> tuple[tuple[Message, ...], str | None]:
    if isinstance(example, PreferenceExample):
        return example.prompt, example.chosen
    if isinstance(example, UnpairedExample):
        return example.prompt, example.completion if example.label else None
    *before, last = example.messages
    if last.role != "assistant":
        return example.messages, None
    return tuple(before), "".join(part for part in last.content if isinstance(part, str))


def _description(example: Example) -> str | None:
    found = example.meta.get("description") or example.meta.get("said")
    return "\n".join(map(str, found)) if isinstance(found, list) else found
