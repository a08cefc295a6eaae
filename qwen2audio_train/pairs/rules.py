"""Pairs made by rule from right answers, such that the texts alone do not tell which answer is right.

Every rule only hands out answers anew: whatever it rejects for one clip, it chooses for another. So over a rule's pairs
the chosen and the rejected answers are the same texts, equally often, and a model that does not listen is right half of
the time, whatever it learns about style and length.

    other_clip      answers to another clip of like length (for speech: fluent, hallucinated transcripts)
    wrong_language  the same clip answered in the language of another of its tasks; else another language's clip
    segments        recordings of three utterances, with the middle one dropped or repeated in the text
    no_speech       silence and noise against speech: a transcript of nothing, and speech that is called nothing
    ignores_audio   the most frequent answer to a prompt against the others, each right as often as wrong
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Clip, Message, PreferenceExample
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.evaluation.scoring.normalise import PER_CHARACTER, normalise
from qwen2audio_train.layout import MAX_SAMPLES, SAMPLING_RATE
from qwen2audio_train.pairs.questions import Question, pair

NO_SPEECH = "There is no speech in this recording."
GAP_S = 0.2
"""Silence between joined utterances."""
NEIGHBOURS = 8
"""How far, in the order of lengths, a partner is looked for."""
FEW_ANSWERS = 0.25
"""A prompt counts as one with fixed answers when it has at most this many different ones per question."""

Rule = Callable[[Sequence[Question], Path, np.random.Generator], list[PreferenceExample]]
"""(questions that have a reference, folder for audio that is made, randomness) -> pairs."""


def other_clip(questions: Sequence[Question], folder: Path, rng: np.random.Generator) -> list[PreferenceExample]:
    """Two questions of one kind and of like answer length, each with the other's answer rejected."""
    made = {"rule": "other_clip"}
    return [
        example
        for group in _grouped(questions, _kind).values()
        for couple in _couples(group, _differ)
        for example in _swapped(couple, made)
    ]


def wrong_language(questions: Sequence[Question], folder: Path, rng: np.random.Generator) -> list[PreferenceExample]:
    """Answers in another language: to the same clip where it has two tasks, else to a clip of another language."""
    left: list[Question] = []
    pairs: list[PreferenceExample] = []

    def other_language(a: Question, b: Question) -> bool:
        return None not in (a.language, b.language) and a.language != b.language and _differ_in_text(a, b)

    for group in _grouped(questions, lambda question: question.clips).values():
        couples = list(_couples(group, other_language))
        pairs += [e for couple in couples for e in _swapped(couple, {"rule": "wrong_language", "same_clip": True})]
        taken = {question.id for couple in couples for question in couple}
        left += [question for question in group if question.id not in taken]
    for group in _grouped(left, lambda question: question.task).values():
        couples = list(_couples(group, other_language))
        pairs += [e for couple in couples for e in _swapped(couple, {"rule": "wrong_language", "same_clip": False})]
    return pairs


def segments(questions: Sequence[Question], folder: Path, rng: np.random.Generator) -> list[PreferenceExample]:
    """Three utterances a b c in one recording: `a b c` against `a c` (dropped) and `a b b c` (repeated), both ways."""
    pairs: list[PreferenceExample] = []
    single = [question for question in questions if len(question.clips) == 1 and question.task in (None, "asr")]
    for group in _grouped(single, _kind).values():
        for trio in (group[start : start + 3] for start in range(0, len(group) - 2, 3)):
            pairs += _segment_pairs(trio, folder)
    return pairs


def no_speech(questions: Sequence[Question], folder: Path, rng: np.random.Generator) -> list[PreferenceExample]:
    """A clip of silence or noise as long as the speech: its transcript is wrong there, and `NO_SPEECH` here."""
    pairs: list[PreferenceExample] = []
    for question in questions:
        if question.task not in (None, "asr") or len(question.clips) != 1:
            continue
        waveform = load_clip(question.clips[0], SampleRecipe())
        level = 10 ** rng.uniform(-4, -1.5) if rng.random() < 0.75 else 0.0
        nothing = (level * rng.standard_normal(len(waveform))).astype(np.float32)
        clip = _written(nothing, folder / f"{_file_name(question.id)}.nothing.flac")
        made = {"rule": "no_speech", "noise_level": float(level)}
        reference = str(question.reference)
        pairs.append(pair(question, NO_SPEECH, [reference], made, name="nothing", prompt=_with_clip(question, clip)))
        pairs.append(pair(question, reference, [NO_SPEECH], made, name="speech"))
    return pairs


def ignores_audio(questions: Sequence[Question], folder: Path, rng: np.random.Generator) -> list[PreferenceExample]:
    """Of prompts with a few fixed answers: the most frequent answer, which needs no listening, against another."""
    pairs: list[PreferenceExample] = []
    for group in _grouped(questions, lambda question: (question.task, question.text)).values():
        counts = Counter(question.reference for question in group)
        if len(counts) < 2 or len(counts) > FEW_ANSWERS * len(group):
            continue
        prior = counts.most_common(1)[0][0]
        frequent = [question for question in group if question.reference == prior]
        others = [question for question in group if question.reference != prior]
        rng.shuffle(frequent)
        rng.shuffle(others)
        for couple in zip(frequent, others, strict=False):
            pairs += _swapped(couple, {"rule": "ignores_audio"})
    return pairs


RULES: dict[str, Rule] = {
    "other_clip": other_clip,
    "wrong_language": wrong_language,
    "segments": segments,
    "no_speech": no_speech,
    "ignores_audio": ignores_audio,
}


def make_pairs(
    questions: Sequence[Question], rules: Iterable[str], folder: Path, seed: int = 0
) -> list[PreferenceExample]:
    """The pairs of each rule in `rules`, over the questions that have a reference and audio.

    Args:
        folder: where recordings that a rule makes are written.

    Raises:
        ConfigError: an unknown rule.
    """
    usable = [question for question in questions if question.reference and question.clips]
    pairs: list[PreferenceExample] = []
    for number, name in enumerate(rules):
        if name not in RULES:
            raise ConfigError(f"rules: {name} is not one of {', '.join(RULES)}")
        made = RULES[name](usable, folder, np.random.default_rng([seed, number]))
        pairs += [replace(example, id=f"{example.id}:{name}") for example in made]
    return pairs


def _swapped(couple: Sequence[Question], made: Mapping[str, object]) -> Iterator[PreferenceExample]:
    """Each question's answer is the other's rejected one."""
    for own, other in (couple, couple[::-1]):
        yield pair(own, str(own.reference), [str(other.reference)], {**made, "partner": other.id})


def _couples(
    group: Sequence[Question], fits: Callable[[Question, Question], bool]
) -> Iterator[tuple[Question, Question]]:
    """Neighbours in answer length that fit together, each question once."""
    order = sorted(group, key=lambda question: (len(str(question.reference)), question.id))
    taken: set[int] = set()
    for first, question in enumerate(order):
        if first in taken:
            continue
        for second in range(first + 1, min(first + 1 + NEIGHBOURS, len(order))):
            if second not in taken and fits(question, order[second]):
                taken |= {first, second}
                yield question, order[second]
                break


def _grouped(questions: Sequence[Question], key: Callable[[Question], Hashable]) -> dict[Hashable, list[Question]]:
    groups: dict[Hashable, list[Question]] = defaultdict(list)
    for question in questions:
        groups[key(question)].append(question)
    return groups


def _kind(question: Question) -> Hashable:
    """Questions of one kind could be asked about each other's clips; a prompt without a task must be the very same."""
    return question.task or question.text, question.language, len(question.clips)


def _differ(a: Question, b: Question) -> bool:
    return a.clips != b.clips and _differ_in_text(a, b)


def _differ_in_text(a: Question, b: Question) -> bool:
    return normalise(str(a.reference), a.language) != normalise(str(b.reference), b.language)


def _segment_pairs(trio: Sequence[Question], folder: Path) -> list[PreferenceExample]:
    a, b, c = (load_clip(question.clips[0], SampleRecipe()) for question in trio)
    gap = np.zeros(round(GAP_S * SAMPLING_RATE), dtype=np.float32)
    audio = {"whole": [a, b, c], "dropped": [a, c], "repeated": [a, b, b, c]}
    joined = {name: np.concatenate([x for part in parts for x in (gap, part)][1:]) for name, parts in audio.items()}
    if len(joined["repeated"]) > MAX_SAMPLES:
        return []
    x, y, z = (str(question.reference) for question in trio)
    space = "" if trio[0].language in PER_CHARACTER else " "
    texts = {name: space.join(words) for name, words in {"whole": (x, y, z), "dropped": (x, z)}.items()}
    texts["repeated"] = space.join((x, y, y, z))
    stem = _file_name("+".join(question.id for question in trio))
    clips = {name: _written(waveform, folder / f"{stem}.{name}.flac") for name, waveform in joined.items()}
    made = {"rule": "segments", "of": [question.id for question in trio]}
    return [
        pair(
            trio[0],
            texts[right],
            [texts[wrong]],
            made,
            name=f"{right}-{wrong}",
            prompt=_with_clip(trio[0], clips[right]),
        )
        for fault in ("dropped", "repeated")
        for right, wrong in (("whole", fault), (fault, "whole"))
    ]


def _with_clip(question: Question, clip: Clip) -> tuple[Message, ...]:
    """The question's prompt with its only clip replaced."""
    return tuple(
        replace(message, content=tuple(clip if isinstance(part, Clip) else part for part in message.content))
        for message in question.prompt
    )


def _written(waveform: np.ndarray, path: Path) -> Clip:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, SAMPLING_RATE)
    return Clip(str(path), len(waveform) / SAMPLING_RATE)


def _file_name(identity: str) -> str:
    return "".join(char if char.isalnum() or char in "-_+." else "_" for char in identity)[:150]
