"""Task-form examples as conversations in analysis mode: the clip with a written question, and the target as answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qwen2audio_train.config.data import PromptStyle
from qwen2audio_train.data.examples import ChatExample, Clip, Example, Message, TaskExample, clips_of
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.prompts.pools import choose_prompt, prompt_fields
from qwen2audio_train.data.storage.files import write_whole
from qwen2audio_train.data.tools.sources import open_manifests
from qwen2audio_train.errors import ExampleError


@dataclass
class ChatOptions:
    """The keys of `launch/data.py chat`.

    Attributes:
        manifests: manifests in task form, whose ids differ.
        output: the manifest in chat form to write; audio paths in it are relative to its folder.
        seed: of the choice among the prompts of a task.
        cache_dir: that of the recipe.
    """

    manifests: list[str] = field(default_factory=list)
    output: str = "???"
    seed: int = 0
    cache_dir: str = "data_cache"


def write_chats(options: ChatOptions) -> int:
    """Write the conversations of some manifests; their number.

    Raises:
        ManifestError: a bad line.
        ExampleError: an example in another form, or an id that two examples have.
    """
    target = Path(options.output)
    manifests = (manifest for path in options.manifests for manifest in open_manifests(path, options.cache_dir))
    examples = (example for manifest in manifests for _, example in manifest.lines())
    lines = [
        json.dumps(to_record(chat, target.parent), ensure_ascii=False) + "\n"
        for chat in chats_of(examples, options.seed)
    ]
    write_whole(target, lines)
    return len(lines)


def chats_of(examples: Iterable[Example | ManifestError], seed: int = 0) -> Iterator[ChatExample]:
    """One conversation per example, with its id and source; task and languages are kept in `meta` for evaluation."""
    seen: set[str] = set()
    for example in examples:
        if isinstance(example, ManifestError):
            raise example
        if not isinstance(example, TaskExample):
            raise ExampleError(f'example "{example.id}" is not in task form: only a task has a question to write')
        if example.id in seen:
            raise ExampleError(f'example "{example.id}" is there twice: give each its own id, or write two outputs')
        seen.add(example.id)
        question: tuple[Clip | str, ...] = (*clips_of(example), written_question(example, seed))
        known = {name: getattr(example, name) for name in ("task", "language", "text_language")}
        yield ChatExample(
            id=example.id,
            messages=(Message("user", question), Message("assistant", (example.target,))),
            source=example.source,
            mode="analysis",
            meta={**example.meta, **{name: value for name, value in known.items() if value is not None}},
        )


def written_question(example: TaskExample, seed: int) -> str:
    """A prompt of the task's pool as a user writes it, chosen by the seed and the example's id."""
    template = choose_prompt(example, PromptStyle.natural, seed)
    return template.prompt.format(**prompt_fields(example)).rstrip()
