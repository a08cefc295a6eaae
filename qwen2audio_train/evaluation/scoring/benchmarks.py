"""Named benchmarks as data: how each is asked and scored, and what has been published for it (benchmarks.yaml)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

import yaml

from qwen2audio_train.data.examples import ChatExample, Clip, Example, Message, TaskExample

Metric = Literal[
    "error_rate",
    "bleu",
    "accuracy",
    "exact_accuracy",
    "choice",
    "letter",
    "judge",
    "hallucination",
    "captions",
    "map",
    "timestamps",
    "slot_f1",
    "event_f1",
    "span_iou",
    "diarization_error_rate",
]
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark, or one split or language of it; benchmarks.yaml explains the fields."""

    name: str
    task: str
    metric: Metric
    language: str | None = None
    text_language: str | None = None
    style: Literal["base", "chat"] = "base"
    prompt: str = ""
    published: Mapping[str, float] = field(default_factory=dict)
    also: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    note: str = ""
    card: str = ""
    version: int = 1

    @property
    def stamp(self) -> str:
        """Name and version, for every number that is made by it: `librispeech_test_clean/1`."""
        return f"{self.name}/{self.version}"

    def example(
        self, name: str, clip: Clip, target: str, *, question: str | None = None, choices: Sequence[str] = ()
    ) -> Example:
        """An item of the benchmark as an example, which a manifest line can be written from.

        Args:
            target: the right answer; for `letter`, the text of the right option, which becomes its letter.
        """
        meta = {"choices": list(choices)} if choices else {}
        if self.style == "base":
            return TaskExample(
                name, clip, self.task, self.language, target, self.name, self.text_language, question, meta
            )
        lines = [
            f"{letter}. {choice}" if self.metric == "letter" else choice
            for letter, choice in zip(LETTERS, choices, strict=False)
        ]
        prompt = self.prompt.format(question=question, choices="\n".join(lines))
        answer = LETTERS[list(choices).index(target)] if self.metric == "letter" else target
        asked = (clip, prompt) if prompt else (clip,)
        messages = (Message("user", asked), Message("assistant", (answer,)))
        return ChatExample(name, messages, self.name, meta={**meta, "task": self.task})


@cache
def benchmarks() -> Mapping[str, Benchmark]:
    """All benchmarks by name."""
    text = (files(__package__) / "benchmarks.yaml").read_text(encoding="utf-8")
    return MappingProxyType({name: Benchmark(name, **entry) for name, entry in yaml.safe_load(text).items()})
