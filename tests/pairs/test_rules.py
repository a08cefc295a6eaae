"""Pairs made by rule: texts alone do not tell which answer is right, and the audio does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import ChatExample, Clip, Message, PreferenceExample, TaskExample
from qwen2audio_train.data.manifests.manifest import parse_line
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.pairs.balance import Balance, balance, text_only_accuracy
from qwen2audio_train.pairs.make import Made
from qwen2audio_train.pairs.questions import Question, questions_of
from qwen2audio_train.pairs.rules import NO_SPEECH, RULES, make_pairs

WORDS = [
    "the",
    "grey",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "near",
    "some",
    "old",
    "door",
    "while",
    "two",
    "red",
    "birds",
    "sang",
    "over",
    "green",
    "hills",
]
EMOTIONS = ("angry", "happy", "neutral", "sad")


def speech(folder: Path, count: int = 24) -> list[Question]:
    """Transcripts of noise, and for every third clip a translation."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        path = folder / f"s{number}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(4800 + 800 * (number % 5)), 16_000)
        clip = Clip(str(path), 0.3 + 0.05 * (number % 5))
        text = " ".join(rng.choice(WORDS, 3 + number % 4))
        examples.append(TaskExample(f"asr/{number}", clip, "asr", "en", text, "s"))
        if number % 3 == 0:
            translation = " ".join(word[::-1] for word in text.split())
            examples.append(TaskExample(f"s2tt/{number}", clip, "s2tt", "en", translation, "s", text_language="de"))
    return questions_of(examples)


def emotions(count: int = 24) -> list[Question]:
    rng = np.random.default_rng(1)
    return [
        Question(
            f"ser/{number}",
            (Message("user", (Clip(f"/e/{number}.wav", 1.0), "How does the speaker feel?")),),
            str(rng.choice(EMOTIONS, p=[0.1, 0.2, 0.5, 0.2])),
            "ser",
            "en",
            "e",
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("rule", RULES)
def test_chosen_and_rejected_are_the_same_texts_equally_often(rule: str, tmp_path: Path) -> None:
    pairs = make_pairs(speech(tmp_path) + emotions(), [rule], tmp_path / "made")
    assert len(pairs) >= 6
    measured = balance(pairs)
    assert measured.swapped
    assert measured.longer_chosen == 0.5
    assert not measured.text_only_accuracy > 0.6
    assert len({example.id for example in pairs}) == len(pairs)
    for example in pairs:
        assert example.meta["pair"]["rule"] == rule
        line = json.dumps(to_record(example, tmp_path))
        assert parse_line(line, str(tmp_path / "pairs.jsonl"), 1) == example


def test_other_clip_answers_are_of_like_length(tmp_path: Path) -> None:
    pairs = make_pairs(speech(tmp_path, 60), ["other_clip"], tmp_path)
    gaps = [abs(len(example.chosen) - len(example.rejected[0])) for example in pairs]
    assert float(np.mean(gaps)) < 1.5
    by_id = {question.id: question for question in speech(tmp_path, 60)}
    for example in pairs:
        question = by_id[example.meta["pair"]["question"]]
        partner = by_id[example.meta["pair"]["partner"]]
        assert (example.chosen, example.rejected[0]) == (question.reference, partner.reference)
        assert question.clips != partner.clips
        assert question.language == partner.language


def test_wrong_language_prefers_the_same_clip(tmp_path: Path) -> None:
    pairs = make_pairs(speech(tmp_path), ["wrong_language"], tmp_path)
    assert all(example.meta["pair"]["same_clip"] for example in pairs)
    assert Counter(example.meta["language"] for example in pairs) == {"en": 8, "de": 8}


def test_segments_are_really_dropped_and_repeated(tmp_path: Path) -> None:
    questions = [question for question in speech(tmp_path) if question.task == "asr"][:3]
    pairs = make_pairs(questions, ["segments"], tmp_path / "made")
    a, b, c = (str(question.reference) for question in questions)
    whole, dropped, repeated = " ".join((a, b, c)), " ".join((a, c)), " ".join((a, b, b, c))
    assert [(e.chosen, e.rejected[0]) for e in pairs] == [
        (whole, dropped),
        (dropped, whole),
        (whole, repeated),
        (repeated, whole),
    ]
    heard = {e.chosen: next(p for p in e.prompt[0].content if isinstance(p, Clip)).duration_s for e in pairs}
    seconds = [float(question.clips[0].duration_s or 0) for question in questions]
    assert heard[whole] == pytest.approx(sum(seconds) + 0.4)
    assert heard[dropped] == pytest.approx(seconds[0] + seconds[2] + 0.2)
    assert heard[repeated] == pytest.approx(sum(seconds) + seconds[1] + 0.6)


def test_nothing_is_as_long_as_the_speech_and_holds_none(tmp_path: Path) -> None:
    questions = speech(tmp_path, 6)
    pairs = make_pairs(questions, ["no_speech"], tmp_path / "made")
    silent = [example for example in pairs if example.chosen == NO_SPEECH]
    assert len(silent) == len(pairs) / 2 == 6
    for example in silent:
        clip = next(part for part in example.prompt[0].content if isinstance(part, Clip))
        waveform, rate = soundfile.read(clip.path)
        assert len(waveform) / rate == pytest.approx(clip.duration_s)
        assert abs(waveform).max() < 0.2


def test_pairs_are_a_function_of_the_seed(tmp_path: Path) -> None:
    questions = emotions()
    first, again, other = (make_pairs(questions, ["ignores_audio"], tmp_path, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_an_unknown_rule_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="other is not one of other_clip"):
        make_pairs([], ["other"], tmp_path)


def test_questions_of_every_form() -> None:
    clip = Clip("a.wav", 1.0)
    task = TaskExample("t", clip, "asr", "en", "hello", "s")
    ask = Message("user", (clip, "What is said?"))
    chat = ChatExample("c", (ask, Message("assistant", ("Hello.",))), "s", meta={"task": "asr", "language": "en"})
    asked = ChatExample("q", (ask,), "s")
    preference = PreferenceExample("p", (ask,), "Hello.", ("Bye.",), "s")
    found = questions_of([task, chat, asked, preference])
    assert [question.reference for question in found] == ["hello", "Hello.", None, "Hello."]
    assert [question.task for question in found] == ["asr", "asr", None, None]
    assert all(question.clips == (clip,) and question.prompt[-1].role == "user" for question in found)
    assert "<|" not in found[0].text


def test_probe_finds_what_text_gives_away() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(200)]
    given_away = [(text, f"{text} uh") for text in texts[:100]]
    assert text_only_accuracy(given_away) > 0.95
    fair = list(zip(texts[:100], texts[100:], strict=True))
    assert 0.3 < text_only_accuracy(fair) < 0.7
    assert np.isnan(text_only_accuracy(fair[:10]))


@pytest.mark.parametrize(
    ("right", "said"),
    [(0.625, "a classifier on the texts alone is right in 62.5%"), (float("nan"), "too few pairs to ask a classifier")],
)
def test_what_is_said_of_the_texts_alone(right: float, said: str) -> None:
    summary = Made(3, {}, {}, Balance(3, 0.5, right, False)).summary()
    assert said in summary
    assert "nan%" not in summary
