"""The commands of `launch/pairs.py`: sample answers and turn them into pairs, or make pairs by rule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import Dtype
from qwen2audio_train.data.examples import PreferenceExample
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.samples.maker import MEASURED_KEYS
from qwen2audio_train.data.samples.recipe import KEYS, plain
from qwen2audio_train.evaluation.decoding.generate import Decoding
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.pairs.balance import Balance, balance
from qwen2audio_train.pairs.candidates import CandidateFile, sample_candidates
from qwen2audio_train.pairs.questions import Question, questions_of
from qwen2audio_train.pairs.rules import make_pairs
from qwen2audio_train.pairs.score import Scorer
from qwen2audio_train.pairs.select import Chosen, Selection, select


class Heard(StrEnum):
    own = "own"
    silence = "silence"


@dataclass
class SamplingOptions:
    """The keys of `launch/pairs.py sample`.

    Attributes:
        checkpoint: hub id, released checkpoint, run folder, checkpoint or adapter that answers.
        manifests: questions, with the right answers where `score` needs them.
        output: preference manifest; what was sampled is kept beside it, in `<output>.answers`.
        num_answers, temperature, top_p, max_new_tokens, seed: of sampling.
        tokens_per_batch: prompt and answer tokens of a batch while decoding.
        audio: what the model hears: `own`, or `silence` for answers that ignore the audio.
        score: auto, error_rate, bleu, exact, judge, or a function of yours as `file.py:function`.
        chosen, min_margin, min_chosen, max_length_ratio, max_rejected: see `select.Selection`.
        judge: settings of the judge, for `score=judge`.
        num_threads: CPU threads; 0 leaves torch's choice.
        dtype: of the weights; unset, as they were saved.
        sample: fields of the checkpoint's `SampleRecipe` to replace, such as `sample.cache_dir`.
    """

    checkpoint: str = ""
    manifests: list[str] = field(default_factory=list)
    output: str = ""
    num_answers: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    tokens_per_batch: int = 8192
    seed: int = 0
    audio: Heard = Heard.own
    score: str = "auto"
    chosen: Chosen = Chosen.best
    min_margin: float = 0.1
    min_chosen: float = 0.0
    max_length_ratio: float = 1.5
    max_rejected: int = 1
    judge: dict[str, Any] = field(default_factory=dict)
    num_threads: int = 0
    dtype: Dtype | None = None
    sample: dict[str, Any] = field(default_factory=dict, metadata={"choices": KEYS})


@dataclass
class RuleOptions:
    """The keys of `launch/pairs.py rules`.

    Attributes:
        manifests: questions with their right answers.
        output: preference manifest; recordings that a rule makes lie beside it, in `<output>.audio/`.
        rules: see `rules`.
        seed: of noise and order.
    """

    manifests: list[str] = field(default_factory=list)
    output: str = ""
    rules: list[str] = field(default_factory=lambda: ["other_clip"])
    seed: int = 0


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        left_out: questions that gave no pair, by reason.
        failed: questions that could not be asked, with the reason.
    """

    num_examples: int
    left_out: dict[str, int]
    failed: dict[str, str]
    balance: Balance

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{self.num_examples} examples, {self.balance.num_pairs} pairs"]
        if self.left_out or self.failed:
            reasons = {**self.left_out, **({"could not be asked": len(self.failed)} if self.failed else {})}
            lines.append("left out: " + ", ".join(f"{name} {count}" for name, count in reasons.items()))
        right = self.balance.text_only_accuracy
        lines.append(
            f"the chosen answer is the longer one in {self.balance.longer_chosen:.1%} of the pairs; "
            + (
                "too few pairs to ask a classifier on the texts alone"
                if math.isnan(right)
                else f"a classifier on the texts alone is right in {right:.1%} (50% = the texts give nothing away)"
            )
        )
        return "\n".join(lines)


def read_questions(manifests: Sequence[str], prompt_seed: int = 0) -> list[Question]:
    """The questions of some manifests, one after the other."""
    return questions_of((example for path in manifests for example in read_manifest(path)), prompt_seed)


def pairs_by_rule(options: RuleOptions) -> Made:
    """Make pairs from right answers and write them."""
    folder = Path(f"{options.output}.audio").absolute()
    pairs = make_pairs(read_questions(options.manifests), options.rules, folder, options.seed)
    return write(pairs, options.output, Counter(), {})


def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SampleRecipe,
    questions: Sequence[Question],
    options: SamplingOptions,
) -> tuple[CandidateFile, dict[str, str]]:
    """Sample answers to the questions, or go on doing so; every rank has to call this."""
    decoding = Decoding(
        max_new_tokens=options.max_new_tokens,
        tokens_per_batch=options.tokens_per_batch,
        temperature=options.temperature,
        top_p=options.top_p,
        num_return_sequences=options.num_answers,
        seed=options.seed,
    )
    settings = {"checkpoint": options.checkpoint, "audio": options.audio.value, **dataclasses.asdict(decoding)}
    settings.pop("tokens_per_batch")
    settings["questions"] = questions_digest(questions)
    settings["dtype"] = str(unwrap(model).dtype).removeprefix("torch.")
    settings["sample"] = {key: plain(recipe)[key] for key in MEASURED_KEYS}
    file = CandidateFile(Path(f"{options.output}.answers"), settings)
    failed = sample_candidates(model, tokenizer, questions, recipe, decoding, file, audio=options.audio.value)
    return file, failed


def questions_digest(questions: Sequence[Question]) -> str:
    """Hash of ids and prompts: the same id with another prompt is another question."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((question.id, question.prompt)).encode())
    return digest.hexdigest()[:16]


def pairs_of_answers(
    questions: Sequence[Question],
    file: CandidateFile,
    failed: dict[str, str],
    score: Scorer,
    options: SamplingOptions,
    judge: dict[str, Any] | None = None,
) -> Made:
    """Score the sampled answers, select pairs and write them.

    Args:
        judge: what the provenance says about the judge.
    """
    names = {rule.name for rule in dataclasses.fields(Selection)}
    rules = Selection(**{name: getattr(options, name) for name in names})
    made_by = {"made_by": "sampled", **file.settings, "score": options.score, **({"judge": judge} if judge else {})}
    left: Counter[str] = Counter()
    answered = [(question, file.done[question.id].answers) for question in questions if question.id in file.done]
    selected = [
        select(question, answers, scores, rules, made_by, left)
        for (question, answers), scores in zip(answered, score(answered), strict=True)
    ]
    pairs = [example for example in selected if example is not None]
    return write(pairs, options.output, left, failed)


def write(pairs: Sequence[PreferenceExample], output: str, left: Counter[str], failed: dict[str, str]) -> Made:
    """Write a preference manifest, aside first, so that an interruption leaves no half of it."""
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        for example in pairs:
            file.write(json.dumps(to_record(example, path.parent), ensure_ascii=False) + "\n")
    aside.rename(path)
    return Made(len(pairs), dict(left), failed, balance(pairs))
