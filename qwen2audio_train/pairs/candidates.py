"""Answers sampled from a checkpoint, kept in a file that an interrupted run goes on from.

A line per question, `{"id": ..., "answers": [...]}`, below a first line that says how they were sampled. What is drawn
for a question depends on the seed and its id alone, so an interrupted and an uninterrupted run give the same answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.errors import UserError
from qwen2audio_train.evaluation.decoding.generate import Decoding, sample_texts
from qwen2audio_train.evaluation.decoding.lazy_samples import Audio, LazySamples
from qwen2audio_train.evaluation.decoding.ranks import rank_and_world
from qwen2audio_train.pairs.questions import Question


class CandidatesError(UserError):
    """A file of candidates that this run cannot go on with."""


@dataclass(frozen=True)
class Candidates:
    """Answers to one question, in the order in which they were drawn."""

    id: str
    answers: tuple[str, ...]


@dataclass
class CandidateFile:
    """The file of a sampling run.

    Args:
        path: where it is, or will be.
        settings: what the answers depend on (checkpoint, decoding, audio); a file of other settings is refused.

    Attributes:
        done: what it holds, by question id; a line that an interruption cut off is left out, and drawn again.

    Raises:
        CandidatesError: the file was made with other settings, or is none of ours.
    """

    path: Path
    settings: dict[str, Any]
    done: dict[str, Candidates] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings = json.loads(json.dumps(self.settings))
        if not self.path.is_file():
            return
        whole = [
            line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
        ]
        try:
            head, *lines = map(json.loads, whole)
            self.done = {line["id"]: Candidates(line["id"], tuple(line["answers"])) for line in lines}
            found = head["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise CandidatesError(f"{self.path}: not a file of sampled answers; move it away") from error
        if found != self.settings:
            keys = sorted(key for key in found | self.settings if found.get(key) != self.settings.get(key))
            raise CandidatesError(
                f"{self.path}: was sampled with other settings ({', '.join(keys)}); give another output, or delete it"
            )
        self.path.write_text("".join(whole), encoding="utf-8")

    def add(self, found: Sequence[Candidates]) -> None:
        """Append to the file and to `done`."""
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"settings": self.settings}, ensure_ascii=False) + "\n", encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as file:
            for candidates in found:
                line = {"id": candidates.id, "answers": candidates.answers}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                self.done[candidates.id] = candidates


def sample_candidates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    recipe: SampleRecipe,
    decoding: Decoding,
    file: CandidateFile,
    *,
    audio: Audio = "own",
    questions_per_chunk: int = 256,
) -> dict[str, str]:
    """Sample `decoding.num_return_sequences` answers to every question that `file` does not have yet.

    Ranks share the work, rank 0 writes, after every `questions_per_chunk` questions.

    Returns:
        Why a question could not be asked, by id.
    """
    failed: dict[str, str] = {}
    rank, _ = rank_and_world()
    left = [question for question in questions if question.id not in file.done]
    for chunk in _chunks(left, questions_per_chunk):
        examples = [question.as_example() for question in chunk]
        samples = LazySamples(examples, tokenizer, recipe, for_generation=True, audio=audio)
        texts = sample_texts(model, tokenizer, samples, decoding, samples.lengths)
        asked = list(zip(samples.examples, texts, strict=True))
        failed |= {e.id: samples.failed.get(i, "no answer") for i, (e, answers) in enumerate(asked) if answers is None}
        if rank == 0:
            file.add([Candidates(example.id, tuple(answers)) for example, answers in asked if answers is not None])
    return failed


def _chunks(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for start in range(0, len(questions), size):
        yield questions[start : start + size]
