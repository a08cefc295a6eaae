"""Which pieces the corpus holds: who says what, and which sounds there are, for training and held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen2audio_train.selfmade import piper, texts
from qwen2audio_train.selfmade.draw import balanced, generator, uniform
from qwen2audio_train.selfmade.grammar import Grammar, Sentence, distinct, is_held_out, load_yaml
from qwen2audio_train.selfmade.pieces import SPOKEN, Piece
from qwen2audio_train.selfmade.sounds import SCENES, SOUNDS
from qwen2audio_train.selfmade.speech import VOICES

FACTS = ("animal", "colour", "number")

OPEN = "open"
"""Origin of a question that a language model answered."""

Row = tuple[str, str, str, dict[str, str]]
"""Text, origin, answer and facts of an utterance that is still to be given a voice."""


@dataclass(frozen=True)
class Variant:
    """How much of everything. Speech counts are utterances per language."""

    languages: tuple[str, ...]
    sentences: dict[str, int]
    phrases: dict[str, int]
    repeats: int
    questions: int
    commands: int
    sounds: int
    scenes: int
    notes: int
    beeps: int
    held_out: dict[str, int]
    held_out_other: int
    dialogues: int
    pairs: int
    share: float = 0.55  # of the words of each category, in languages other than English
    grammars: tuple[str, ...] = ("core",)  # of English
    unseen: float = 0.15  # of the held-out sentences hold a word that training does not
    texts: bool = False  # English from texts/ too: sentences, questions with a language model's answers
    piper: float = 0.0  # of the English speech in training, where that voice is installed
    quiet: int = 0  # clips in which nobody speaks


def _counts(languages: tuple[str, ...], first: int, others: int) -> dict[str, int]:
    return {language: first if language == "en" else others for language in languages}


_DEMO, _FULL = ("en", "de", "zh"), ("en", "de", "zh", "fr", "es", "it")

VARIANTS = {
    "small": Variant(
        _DEMO, _counts(_DEMO, 150, 40), _counts(_DEMO, 30, 10), 0, 60, 24, 24, 12, 24, 15,
        _counts(_DEMO, 40, 10), 20, 40, 20,
    ),
    "demo": Variant(
        _DEMO, _counts(_DEMO, 3200, 1500), _counts(_DEMO, 1000, 500), 3, 3000, 900, 960, 360, 840, 600,
        _counts(_DEMO, 300, 100), 84, 3000, 400,
    ),
    "full": Variant(
        _FULL, _counts(_FULL, 16000, 5000), _counts(_FULL, 4000, 1500), 6, 6000, 3000, 3000, 1200, 2520, 1200,
        _counts(_FULL, 1000, 300), 168, 8000, 2000, share=1.0, grammars=("core", "english"), unseen=0.2,
    ),
    "open": Variant(
        _DEMO, _counts(_DEMO, 400, 500), _counts(_DEMO, 50, 50), 0, 600, 240, 480, 120, 336, 240,
        _counts(_DEMO, 60, 60), 42, 800, 200, texts=True, piper=0.3, quiet=120,
    ),
}  # fmt: skip


def voices(split: str, key: str) -> Iterator[str]:
    """An endless stream of voices of a split: women and men in turn, each in an order of its own."""
    rng = generator("voices", split, key)
    while True:
        women, men = (rng.permutation(VOICES[split][gender]) for gender in ("female", "male"))
        for woman, man in zip(women, men, strict=False):
            yield from (str(woman), str(man))


def _facts(sentence: Sentence) -> dict[str, str]:
    """Texts in the other languages, and the words that a question can ask for (where there is only one of the kind)."""
    facts = {f"text_{language}": text for language, text in sentence.texts.items()}
    for category in FACTS:
        named = [word for word in sentence.words if word.category == category]
        if len(named) == 1:
            facts[category] = next(iter(named[0].forms["en"].values()))
    return facts


@dataclass(frozen=True)
class SpokenQuestion:
    """Something to ask aloud, its answer ("" where the answer is the sound around it), and its side of the split."""

    kind: str
    item: str
    text: str
    answer: str
    held_out: bool


def _stream(grammar: Grammar, rng: np.random.Generator, unseen: bool = False) -> Iterator[Sentence]:
    while True:
        yield grammar.sample("sentences", rng, unseen=unseen)


def _row(sentence: Sentence, language: str) -> Row:
    return sentence.texts[language], sentence.kind, "", _facts(sentence)


def questions(name: str) -> list[SpokenQuestion]:
    """Every question of `voice_chat`, `commands` or `listen`.

    Each thing that can be asked for is held out in one of the ways to ask for it, another one from thing to thing: all
    things and all ways are learnt, and what is held out is their combination. Without things, two ways are held out.
    """
    spec: Any = load_yaml("dialogues")[name]
    found: dict[str, SpokenQuestion] = {}
    for kind, entry in (spec if name == "voice_chat" else {name: spec}).items():
        items = entry.get("items", {"": ""})
        period = len(entry["ask"]) if len(items) > 1 else 5
        for number, (item, answer) in enumerate(items.items()):
            for way, ask in enumerate(entry["ask"]):
                text, reply = ask.format(x=item), entry.get("answer", "{y}").format(x=item, y=answer)
                found[text] = SpokenQuestion(kind, item, text, reply, (number + way) % period == period - 1)
    return list(found.values())


def _free_rows(split: str) -> list[Row]:
    """The sentences of texts/ and its questions on one side of the split; a synthesiser needs their punctuation."""
    found = [(text, "sentence", "") for text in texts.sentences()]
    found += [(question, OPEN, answer) for question, answer in texts.questions()]
    plain = {texts.plain_words(text): (text, origin, answer) for text, origin, answer in found}
    return [
        (words, origin, answer, {SPOKEN: text})
        for words, (text, origin, answer) in plain.items()
        if is_held_out(words) == (split == "dev")
    ]


def _spoken(rows: list[SpokenQuestion], split: str, count: int, key: str) -> list[SpokenQuestion]:
    """`count` questions of a side of the split: in training every item, held out every kind as often as the others."""
    asked = [row for row in rows if row.held_out == (split == "dev")]
    return balanced(
        asked, lambda row: (row.kind, row.item if split == "train" else ""), count, generator("spoken", split, key)
    )


class Planner:
    """Makes the pieces of a variant. The plan is a function of the variant and the seed; no audio is touched."""

    def __init__(self, variant: Variant, seed: int) -> None:
        self.variant, self.seed = variant, seed
        english = [Grammar(name) for name in variant.grammars]
        others = [Grammar(share=variant.share)]
        self.grammars = {language: english if language == "en" else others for language in variant.languages}
        self.piper = variant.piper if piper.is_installed() else 0.0

    def speech(self, split: str, language: str) -> list[Piece]:
        """All plain speech of a language: words and phrases (training only), sentences, and questions in English."""
        rng = generator(self.seed, "speech", split, language)
        rows = self._training(language, rng) if split == "train" else self._held_out(language, rng)
        if language == "en":
            count = self.variant.questions if split == "train" else max(self.variant.held_out["en"] // 2, 9)
            asked = _spoken(questions("voice_chat"), split, count, "voice_chat")
            asked += _spoken(questions("commands"), split, count // 7, "commands")
            rows += [(row.text, row.kind, row.answer, {}) for row in asked]
            rows += _free_rows(split) if self.variant.texts else []
        pieces = []
        for i, ((text, origin, answer, facts), voice) in enumerate(zip(rows, voices(split, language), strict=False)):
            name = f"{split}/{language}/{i:05d}"
            if language == "en" and split == "train" and uniform("piper", self.seed, name) < self.piper:
                voice = piper.VOICE
            pieces.append(Piece(name, "speech", text, language, voice, origin=origin, answer=answer, facts=facts))
        return pieces

    def _training(self, language: str, rng: np.random.Generator) -> list[Row]:
        """Single words, phrases and sentences, an equal share of the latter two from each grammar."""
        rows: list[Row] = [
            (word, "word", "", {}) for word in self._words(language) for _ in range(self.variant.repeats)
        ]
        grammars = self.grammars[language]
        sentences: list[Sentence] = []
        for grammar in grammars:
            sentences += [
                grammar.sample("phrases", rng) for _ in range(self.variant.phrases[language] // len(grammars))
            ]
            count = self.variant.sentences[language] // len(grammars)
            sentences += distinct(_stream(grammar, rng), count, language, held_out=False)
        return rows + [_row(sentence, language) for sentence in sentences]

    def _held_out(self, language: str, rng: np.random.Generator) -> list[Row]:
        """Held-out sentences, a share of them with one word that the training set does not hold."""
        train = self._training(language, generator(self.seed, "speech", "train", language))
        taken = frozenset(text for text, *_ in train)
        grammars, sentences = self.grammars[language], []
        for grammar in grammars:
            count = self.variant.held_out[language] // len(grammars)
            unseen = round(self.variant.unseen * count)
            sentences += distinct(_stream(grammar, rng), count - unseen, language, held_out=True, taken=taken)
            sentences += distinct(_stream(grammar, rng, unseen=True), unseen, language, held_out=True, taken=taken)
        return [_row(sentence, language) for sentence in sentences]

    def _words(self, language: str) -> list[str]:
        """Every word of the training set alone, in each of its forms."""
        words = [word for grammar in self.grammars[language] for word in grammar.singles(language)]
        if language == "en":
            words += [word for row in questions("voice_chat") if not row.held_out for word in row.text.split()]
        return list(dict.fromkeys(words))

    def others(self, split: str) -> list[Piece]:
        """Sounds, scenes, notes and beeps: every label as often as the others."""
        variant, names = self.variant, load_yaml("dialogues")["names"]
        counts = {"sound": variant.sounds, "scene": variant.scenes, "note": variant.notes, "beeps": variant.beeps}
        counts |= {"quiet": variant.quiet} if variant.quiet else {}
        if split == "dev":
            counts = dict.fromkeys(counts, variant.held_out_other)
        labels: dict[str, list[tuple[str, str]]] = {
            "sound": [(name, "") for name in SOUNDS],
            "scene": [(name, "") for name in SCENES],
            "note": [(instrument, note) for note in names["notes"] for instrument in names["instruments"]],
            "beeps": [(str(number), "") for number in range(1, 6)],
            "quiet": [("silence", ""), ("noise", "")],
        }
        pieces = []
        for kind, count in counts.items():
            for i in range(count):
                label, note = labels[kind][i % len(labels[kind])]
                pieces.append(Piece(f"{split}/{kind}/{i:05d}", kind, label=label, note=note))  # type: ignore[arg-type]
        return pieces

    def commands(self, split: str, talk: list[Piece]) -> list[Piece]:
        """Commands inside a sound; half of them after somebody else's sentence from `talk`, a third about the sound."""
        count = self.variant.commands if split == "train" else min(60, self.variant.commands)
        rng = generator(self.seed, "commands", split)
        asked = _spoken(questions("commands"), split, count, "inside")
        listened = _spoken(questions("listen"), split, count, "inside")
        names, speakers, pieces = list(SOUNDS), voices(split, "commands"), []
        for i, voice in zip(range(count), speakers, strict=False):
            row, sound = (listened if i % 3 == 2 else asked)[i], names[int(rng.integers(len(names)))]
            other = talk[int(rng.integers(len(talk)))] if rng.random() < 0.5 else None
            pieces.append(
                Piece(
                    f"{split}/command/{i:05d}", "command", row.text, "en", voice, label=sound, origin=row.kind,
                    answer=row.answer or f"{sound}.", other=other,
                )
            )  # fmt: skip
        return pieces
