"""The parts that the self-made corpus is made of: grammar, questions, speech, sounds, effects."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from qwen2audio_train.layout import SAMPLING_RATE
from qwen2audio_train.selfmade import effects, piper, sounds, texts
from qwen2audio_train.selfmade.build import _manifests, _plan
from qwen2audio_train.selfmade.draw import balanced, generator
from qwen2audio_train.selfmade.grammar import Grammar, load_yaml
from qwen2audio_train.selfmade.pieces import SPOKEN
from qwen2audio_train.selfmade.speech import phonemes
from qwen2audio_train.selfmade.tasks import Line, Pools, words_of
from qwen2audio_train.selfmade.utterances import VARIANTS, Planner, questions

TABLE = [
    (
        {"w": "i", "v": "buy", "c": "red", "x": "apple"},
        {"w": ["who"], "v": ["handles"], "c": ["colour"], "x": ["food"]},
        {"en": "{w} {v:w} a {c} {x}", "de": "{w} {v:w} {einen:x} {c}{en:x} {x}", "fr": "{w} {v:w} {a:x} {x} {c:x}"},
        {"en": "i buy a red apple", "de": "ich kaufe einen roten apfel", "fr": "j'achète une pomme rouge"},
    ),
    (
        {"q": "old", "x": "egg"},
        {"q": ["size"], "x": ["food"]},
        {"en": "a {q} {x}", "de": "{the:x} {q}e {x}", "fr": "{the:x} {q:x} {x}", "it": "{the:x} {x} {q:x}"},
        {"en": "an old egg", "de": "das alte ei", "fr": "le vieil œuf", "it": "l'uovo vecchio"},
    ),
    (
        {"n": "two", "x": "horse"},
        {"n": ["number"], "x": ["animal"]},
        {"en": "{n} {x.pl}", "de": "{n} {x.pl}", "zh": "{n}{x.key}{x}", "es": "{n} {x.pl}"},
        {"en": "two horses", "de": "zwei pferde", "zh": "两匹马", "es": "dos caballos"},
    ),
]


@pytest.mark.parametrize(("words", "slots", "template", "expected"), TABLE)
def test_sentences_agree_in_every_language(
    words: dict[str, str], slots: dict[str, list[str]], template: dict[str, str], expected: dict[str, str]
) -> None:
    grammar = Grammar()
    chosen = {
        name: next(word for word in grammar.words(slots[name], unseen=True) if base in word.forms["en"].values())
        for name, base in words.items()
    }
    assert dict(grammar.sentence("sentence", template, chosen).texts) == expected


def test_every_template_fills_in_every_language() -> None:
    for name in ("core", "english"):
        grammar, rng = Grammar(name), generator("templates")
        for section in ("phrases", "sentences"):
            for _ in range(3000):
                sentence = grammar.sample(section, rng)
                assert set(sentence.texts) == set(grammar.languages)
                assert not any(mark in text for text in sentence.texts.values() for mark in "{}_|:")
                assert not sentence.has_unseen_word


@pytest.mark.parametrize(("variant", "num_types"), [("demo", 200), pytest.param("full", 1000, marks=pytest.mark.slow)])
def test_vocabulary_and_share_of_unseen_words(variant: str, num_types: int) -> None:
    planner = Planner(VARIANTS[variant], seed=0)
    for language in ("en", "de", "zh"):
        types = {}
        for split in ("train", "dev"):
            spoken = planner.speech(split, language)
            texts = [piece.text for piece in spoken if split == "train" or piece.origin == "sentence"]
            types[split] = {word for text in texts for word in words_of(text, language)}
        unseen = types["dev"] - types["train"]
        assert 0.08 < len(unseen) / len(types["dev"]) < 0.14
        if language == "en":
            assert len(types["train"]) >= num_types


def test_six_languages_and_more_english_give_all_manifests() -> None:
    languages = VARIANTS["full"].languages
    counts = dict.fromkeys(languages, 40)
    few = replace(VARIANTS["small"], languages=languages, sentences=counts, phrases=counts, held_out=counts)
    variant = replace(few, grammars=("core", "english"))
    pools = {split: Pools(_plan(variant, 0, split), defaultdict(lambda: 1.0)) for split in ("train", "dev")}
    manifests = _manifests(pools, variant, seed=0)
    for source in ("asr_fr", "asr_es", "asr_it", "s2tt_fr_en", "s2tt_es_en", "s2tt_it_en", "s2tt_en_de", "lid"):
        assert manifests[f"pretrain.{source}.train.jsonl"]
    assert {line["target"] for line in manifests["pretrain.lid.train.jsonl"]} >= {"french", "spanish", "italian"}


def test_both_splits_ask_for_everything() -> None:
    rows = questions("voice_chat")
    for kind in {row.kind for row in rows}:
        answers = [{row.answer for row in rows if row.kind == kind and row.held_out == side} for side in (True, False)]
        assert answers[0] == answers[1]
    assert {row.held_out for row in questions("listen")} == {True, False}


def test_an_answer_repeats_what_was_asked_for() -> None:
    spec = load_yaml("dialogues")["voice_chat"]
    for row in questions("voice_chat"):
        result = spec[row.kind]["items"][row.item]
        assert row.answer.endswith(result), row
        assert len(row.answer) > len(result) or row.kind == "repeat", row
        assert row.item in row.answer, row


def test_answers_to_questions_are_right() -> None:
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    spec = load_yaml("dialogues")["voice_chat"]
    for item, answer in spec["plus"]["items"].items():
        one, two = item.split(" plus ")
        assert answer == f"{numbers[numbers.index(one) + numbers.index(two)]}."
    for kind, step in (("after", 1), ("before", -1)):
        for item, answer in spec[kind]["items"].items():
            assert answer == f"{numbers[numbers.index(item) + step]}."
    opposites = spec["opposite"]["items"]
    assert all(opposites[answer[:-1]] == f"{item}." for item, answer in opposites.items())
    german = {
        word.forms["en"]["sg"]: word.forms["de"]["sg"] for word in Grammar().words(["animal", "thing"], unseen=True)
    }
    known = {item: answer for item, answer in spec["german"]["items"].items() if item in german}
    assert len(known) > 8
    assert all(answer == f"{german[item]}." for item, answer in known.items())


def test_balanced_gives_every_value_its_share() -> None:
    items = ["a"] * 50 + ["b"] * 5 + ["c"]
    assert Counter(balanced(items, str, 30, generator("x"))) == {"a": 10, "b": 10, "c": 10}


def test_same_sentence_same_samples_whatever_was_said_before() -> None:
    pytest.importorskip("espeakng_loader")
    from qwen2audio_train.selfmade.speech import synthesise

    first = synthesise("the dog runs", "en", "f1")
    synthesise("der hund läuft", "de", "m3", rate=240, pitch=70)
    assert np.array_equal(first, synthesise("the dog runs", "en", "f1"))
    assert first.dtype == np.float32
    assert 0.4 < len(first) / SAMPLING_RATE < 1.5


def test_women_speak_higher_than_men() -> None:
    pytest.importorskip("espeakng_loader")
    from qwen2audio_train.selfmade.speech import VOICES, synthesise

    def pitch(voice: str) -> float:
        """Lag of the largest autocorrelation between 70 and 350 Hz."""
        waveform = synthesise("now we all run", "en", voice)
        spectrum = np.abs(np.fft.rfft(waveform, 2 * len(waveform))) ** 2
        correlation = np.fft.irfft(spectrum)[SAMPLING_RATE // 350 : SAMPLING_RATE // 70]
        return SAMPLING_RATE / (np.argmax(correlation) + SAMPLING_RATE // 350)

    for split in ("train", "dev"):
        women, men = ([pitch(voice) for voice in VOICES[split][gender]] for gender in ("female", "male"))
        assert np.median(women) > 150 > 130 > np.median(men)


def test_noise_comes_at_the_asked_ratio() -> None:
    rng = generator("noise")
    tone = np.sin(2 * np.pi * 440 * np.arange(SAMPLING_RATE) / SAMPLING_RATE).astype(np.float32)
    noise = effects.add_noise(tone, 12.0, 1.0, rng) - tone
    assert 20 * np.log10(effects.rms(tone) / effects.rms(noise)) == pytest.approx(12.0, abs=0.01)
    # brown noise: power falls by 6 dB an octave
    spectrum = np.abs(np.fft.rfft(effects.coloured_noise(1 << 18, 2.0, rng))) ** 2
    low, high = spectrum[4096:8192].mean(), spectrum[8192:16384].mean()
    assert 10 * np.log10(low / high) == pytest.approx(6.0, abs=0.3)


def test_a_room_decays_as_told() -> None:
    click = np.zeros(SAMPLING_RATE // 2, dtype=np.float32)
    click[0] = 1.0
    room = effects.reverberate(click, 0.3, -6.0, generator("room"))
    assert room[0] == pytest.approx(1.0)
    assert 10 * np.log10(np.sum(room[1:] ** 2)) == pytest.approx(-6.0, abs=0.1)
    early, late = (np.mean(room[s : s + 800] ** 2) for s in (400, 400 + SAMPLING_RATE // 10))
    assert 10 * np.log10(early / late) == pytest.approx(20.0, abs=2.5)  # 60 dB in 0.3 s


def test_set_level_never_clips() -> None:
    spike = np.zeros(1000, dtype=np.float32)
    spike[10] = 1e-3
    assert np.abs(effects.set_level(spike, -10)).max() == pytest.approx(0.98)
    assert effects.rms(effects.set_level(np.ones(1000, np.float32), -20)) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("instrument", sounds.INSTRUMENTS)
def test_notes_have_their_pitch(instrument: str) -> None:
    for frequency in (523.25, 880.0):
        waveform = sounds.note(instrument, frequency, 0.8, generator("note", instrument))
        spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
        hertz = np.fft.rfftfreq(len(waveform), 1 / SAMPLING_RATE)
        near = (hertz > frequency * 0.9) & (hertz < frequency * 1.1)
        assert hertz[near][np.argmax(spectrum[near])] == pytest.approx(frequency, rel=0.025)
        assert spectrum[near].max() > 20 * np.median(spectrum)


@pytest.mark.parametrize("count", range(1, 6))
def test_beeps_can_be_counted(count: int) -> None:
    waveform = sounds.beeps(count, generator("beeps", count))
    loud = np.abs(waveform[: len(waveform) // 160 * 160]).reshape(-1, 160).max(axis=1) > 0.3
    assert np.count_nonzero(np.diff(loud.astype(int)) == 1) == count


def test_sounds_differ_more_between_than_within() -> None:
    """A nearest-mean classifier on band energies tells the twelve sounds apart."""

    def fingerprint(waveform: np.ndarray) -> np.ndarray:
        frames = waveform[: len(waveform) // 400 * 400].reshape(-1, 400) * np.hanning(400)
        bands = np.array_split(np.abs(np.fft.rfft(frames)) ** 2, 16, axis=1)
        energy = np.log10(np.stack([band.mean(axis=1) for band in bands], axis=1) + 1e-7)
        return np.concatenate([energy.mean(axis=0), energy.std(axis=0)])

    means, tests = {}, []
    for name in sounds.SOUNDS:
        prints = [fingerprint(sounds.sound(name, 1.4, generator("sound", name, i))) for i in range(9)]
        means[name] = np.mean(prints[:6], axis=0)
        tests += [(name, one) for one in prints[6:]]
    right = [min(means, key=lambda other: float(np.sum((means[other] - one) ** 2))) == name for name, one in tests]
    assert np.mean(right) > 0.9


def test_sentences_that_cannot_be_read_aloud_are_left_out() -> None:
    text = '1. **Go home** now, please.\nIn 1990 it rained. "Who’s there now?" he asked quietly. Go. It has no stop'
    assert list(texts.sentences_of(text)) == ["Go home now, please.", "Who's there now?", "he asked quietly."]
    assert texts.plain_words("Don't go, well-known man!") == "don't go well known man"


def test_an_answer_is_one_short_sentence_or_none() -> None:
    assert texts.answer_of("Dogs eat meat. They bark.") == "Dogs eat meat."
    assert texts.answer_of("In 1990, it rained.") is None
    assert texts.answer_of("word " * 30 + ".") is None


@pytest.fixture(scope="module")
def opened() -> tuple[dict[str, Pools], dict[str, list[Line]]]:
    """Pools and manifests of the variant `open`, every clip taken for one second long."""
    variant = VARIANTS["open"]
    plan = {split: _plan(variant, 0, split) for split in ("train", "dev")}
    pools = {
        split: Pools(pieces, {piece.id: 1.0 for kind in pieces.values() for piece in kind})
        for split, pieces in plan.items()
    }
    return pools, _manifests(pools, variant, 0)


def test_free_text_is_split_by_its_words(opened: tuple[dict[str, Pools], dict[str, list[Line]]]) -> None:
    said = {
        split: {piece.text for piece in pool.pieces["speech"] if SPOKEN in piece.facts}
        for split, pool in opened[0].items()
    }
    assert not said["train"] & said["dev"]
    share = len(said["dev"]) / (len(said["train"]) + len(said["dev"]))
    assert 0.12 < share < 0.18
    assert all(text == texts.plain_words(text) for text in said["dev"])


def test_the_natural_voice_is_never_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for installed in (False, True):
        monkeypatch.setattr(piper, "is_installed", lambda answer=installed: answer)
        planner = Planner(VARIANTS["open"], 0)
        for split in ("train", "dev"):
            spoken = planner.speech(split, "en")
            counts[installed, split] = sum(piece.voice == piper.VOICE for piece in spoken) / len(spoken)
    assert counts[False, "train"] == counts[False, "dev"] == counts[True, "dev"] == 0
    assert abs(counts[True, "train"] - 0.3) < 0.04


def test_text_is_replayed_without_audio_and_silence_has_an_answer(
    opened: tuple[dict[str, Pools], dict[str, list[Line]]],
) -> None:
    manifests = opened[1]
    for line in manifests["text.train.jsonl"]:
        assert [part["type"] for part in line["messages"][0]["content"]] == ["text"]
    assert {line["source"] for line in manifests["text.dev.jsonl"]} == {"text_chat", "plain_text"}
    quiet = [line for line in manifests["sft.train.jsonl"] if line["source"] == "quiet"]
    assert len(quiet) == VARIANTS["open"].quiet
    assert {(line["mode"], line["meta"]["kind"]) for line in quiet} == {
        (mode, kind) for mode in ("voice_chat", "analysis") for kind in ("silence", "noise")
    }
    assert all(line["meta"]["no_speech"] for line in quiet)


def test_phonemes_come_clause_by_clause() -> None:
    assert phonemes(["hello. how are you?", "yes"], "gmw/en-US") == ["həlˈoʊ hˈaʊ ɑːɹ juː", "jˈɛs"]


@pytest.mark.skipif(not piper.is_installed(), reason="the extra piper is not installed")
def test_the_natural_voice_says_the_same_twice_and_a_higher_pitch_is_heard() -> None:
    low, high = (piper.synthesise_piper("we sell nine lamps.", pitch=pitch) for pitch in (0.9, 1.15))
    assert np.array_equal(low, piper.synthesise_piper("we sell nine lamps.", pitch=0.9))
    assert abs(len(low) / len(high) - 1) < 0.1  # the pitch alone changes, not the tempo
    centroids = [
        float((np.abs(np.fft.rfft(wave)) * np.fft.rfftfreq(len(wave))).sum() / np.abs(np.fft.rfft(wave)).sum())
        for wave in (low, high)
    ]
    assert centroids[1] > 1.05 * centroids[0]
