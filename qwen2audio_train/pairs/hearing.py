"""Only the questions that need ears: what a model answers right about a silenced clip teaches nothing about hearing.

Every question is answered several times with zeros of the same length in the place of its clips. Where a share of the
answers is right all the same, from the wording, from the choices or by chance, the example is left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.bounds import at_least
from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import Dtype
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.samples.recipe import KEYS
from qwen2audio_train.data.storage.files import write_whole
from qwen2audio_train.pairs.candidates import CandidateFile
from qwen2audio_train.pairs.make import Heard, SamplingOptions, answer
from qwen2audio_train.pairs.questions import Question, questions_of
from qwen2audio_train.pairs.score import Scorer

DECODING = ("num_answers", "temperature", "top_p", "max_new_tokens", "tokens_per_batch", "seed")


@dataclass
class HearingOptions:
    """The keys of `launch/pairs.py hearing`.

    Attributes:
        checkpoint: hub id, released checkpoint, run folder, checkpoint or adapter that answers.
        manifests: questions with their right answers, in any form.
        output: manifest of the examples that are kept; the answers lie beside it, in `<output>.answers`, and the
            examples that were left out in `<output>.left_out`.
        num_answers, temperature, top_p, max_new_tokens, seed: of sampling.
        tokens_per_batch: prompt and answer tokens of a batch while decoding.
        score: auto, error_rate, bleu, exact, choice, or a function of yours as `file.py:function`.
        right_from: score from which an answer counts as right.
        max_right: largest share of right answers about silence with which an example is kept.
        num_threads: CPU threads; 0 leaves torch's choice.
        dtype: of the weights; unset, as they were saved.
        sample: fields of the checkpoint's `SampleRecipe` to replace, such as `sample.cache_dir`.
    """

    checkpoint: str = ""
    manifests: list[str] = field(default_factory=list)
    output: str = ""
    num_answers: int = at_least(1, 4)
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    tokens_per_batch: int = 8192
    seed: int = 0
    score: str = "auto"
    right_from: float = at_least(0, 0.5, 1)
    max_right: float = at_least(0, 0.0, 1)
    num_threads: int = 0
    dtype: Dtype | None = None
    sample: dict[str, Any] = field(default_factory=dict, metadata={"choices": KEYS})


@dataclass(frozen=True)
class Sifted:
    """Examples by what became of them, and how many there are of each sort."""

    kept: tuple[Example, ...]
    left_out: tuple[Example, ...]
    counts: Counter[str]

    def summary(self) -> str:
        return f"{len(self.kept)} examples kept; " + ", ".join(f"{name} {n}" for name, n in sorted(self.counts.items()))


def answer_deaf(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SampleRecipe,
    examples: Sequence[Example],
    options: HearingOptions,
) -> CandidateFile:
    """Answers about silence, or those that an interrupted run lacks; every rank has to call this."""
    shared = {name: getattr(options, name) for name in ("checkpoint", "output", *DECODING)}
    sampling = SamplingOptions(**shared, audio=Heard.silence)
    asked = [question for question in questions_of(examples, options.seed) if _can_be_asked(question)]
    file, _ = answer(model, tokenizer, recipe, asked, sampling)
    return file


def sift(examples: Sequence[Example], file: CandidateFile, score: Scorer, options: HearingOptions) -> Sifted:
    """The examples that a deaf model fails, and those that it does not.

    Kept are also text without a clip, and what could not be asked or has no right answer: nothing is known against it.
    """
    questions = questions_of(examples, options.seed)
    answered = [(q, file.done[q.id].answers) for q in questions if _can_be_asked(q) and q.id in file.done]
    right = {
        question.id: sum(value is not None and value >= options.right_from for value in scores) / max(1, len(scores))
        for (question, _), scores in zip(answered, score(answered), strict=True)
    }
    kept, left_out, counts = [], [], Counter[str]()
    for example, question in zip(examples, questions, strict=True):
        if not question.clips:
            counts["without a clip"] += 1
        elif question.id not in right:
            counts["not asked"] += 1
        elif right[question.id] > options.max_right:
            counts["answered deaf, left out"] += 1
            left_out.append(example)
            continue
        else:
            counts["failed deaf"] += 1
        kept.append(example)
    return Sifted(tuple(kept), tuple(left_out), counts)


def write_sifted(sifted: Sifted, output: str) -> None:
    """Both lists as manifests, each whole or not at all."""
    for path, examples in ((Path(output), sifted.kept), (Path(f"{output}.left_out"), sifted.left_out)):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(to_record(example, path.parent), ensure_ascii=False) + "\n" for example in examples)
        write_whole(path, lines)


def _can_be_asked(question: Question) -> bool:
    return bool(question.clips) and question.reference is not None
