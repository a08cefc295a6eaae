"""Manifest lines in the task form: what pre-training learns from the pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen2audio_train.selfmade.draw import balanced, generator
from qwen2audio_train.selfmade.grammar import load_yaml
from qwen2audio_train.selfmade.pieces import Piece

Line = dict[str, Any]
TRANSLATIONS = (("en", "de"), ("de", "en"), ("en", "zh"), ("zh", "en"), ("fr", "en"), ("es", "en"), ("it", "en"))
SENTENCES = ("sentence", "phrase")
QUESTION_KINDS = (
    *("gender", "language", "sound", "instrument", "beeps"),
    *("first_word", "last_word", "animal", "colour", "number"),
)
"""Written questions about one clip, whose answers are one of a few."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five")


def words_of(text: str, language: str) -> list[str]:
    """Words of a text, or its characters in Chinese."""
    return list(text.replace(" ", "")) if language == "zh" else text.split()


@dataclass(frozen=True)
class Pools:
    """The pieces of one split by kind, the duration in seconds of each, and, where held out, the words of training."""

    pieces: Mapping[str, Sequence[Piece]]
    durations: Mapping[str, float]
    known_words: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def speech(self, *languages: str, origins: Sequence[str] = SENTENCES) -> list[Piece]:
        """Speech of some languages (all where none is named), from some parts of the grammar."""
        return [
            piece
            for piece in self.pieces["speech"]
            if piece.origin in origins and (not languages or piece.language in languages)
        ]

    def unseen_words(self, piece: Piece) -> list[str]:
        """Words of a held-out piece that no training piece of its language holds."""
        known = self.known_words.get(piece.language)
        words = words_of(piece.text, piece.language)
        return [word for word in words if known is not None and word not in known]


def candidates(kind: str, pools: Pools) -> list[tuple[Piece, str]]:
    """Every piece that a question of `kind` can be asked about, with the right answer."""
    answers = load_yaml("dialogues")["analysis"][kind].get("answer", {})
    if kind == "gender":
        return [(piece, answers[piece.gender]) for piece in pools.speech()]
    if kind == "language":
        return [(piece, answers[piece.language]) for piece in pools.speech()]
    if kind in ("sound", "instrument"):
        return [(piece, f"{piece.label}.") for piece in pools.pieces["sound" if kind == "sound" else "note"]]
    if kind == "beeps":
        return [(piece, f"{_NUMBERS[int(piece.label)]}.") for piece in pools.pieces["beeps"]]
    english = [piece for piece in pools.speech("en") if len(piece.text.split()) > 1 and not pools.unseen_words(piece)]
    if kind == "transcript":
        return [(piece, f"{piece.text}.") for piece in english]
    if kind in ("first_word", "last_word"):
        place = 0 if kind == "first_word" else -1
        return [(piece, f"{piece.text.split()[place]}.") for piece in english]
    return [(piece, f"{piece.facts[kind]}.") for piece in english if kind in piece.facts]


def written_question(kind: str, rng: np.random.Generator, **fields: str) -> str:
    """One of the ways to ask a question of `kind`."""
    asks = load_yaml("dialogues")["analysis"][kind]["ask"]
    return str(asks[rng.integers(len(asks))]).format(**fields)


def _meta(piece: Piece, pools: Pools) -> Line:
    meta: Line = {"kind": piece.origin or piece.kind}
    if piece.voice:
        meta |= {"speaker": piece.voice, "gender": piece.gender}
    if piece.language in pools.known_words:
        meta["unseen_words"] = pools.unseen_words(piece)
    return meta


def _line(source: str, task: str, piece: Piece, target: str, pools: Pools, **extra: str) -> Line:
    name = piece.id.split("/", 1)[1]
    return {
        "id": f"{source}/{name}",
        "audio": piece.file,
        "duration_s": pools.durations[piece.id],
        "task": task,
        "language": piece.language or None,
        "target": target,
        "source": source,
        **extra,
        "meta": _meta(piece, pools),
    }


def task_lines(pools: Pools, languages: Sequence[str], count: int, seed: int, split: str) -> list[Line]:
    """All lines of pre-training; `count` is the number per classification task, questions are twice as many.

    Held out are sentences alone (no spoken questions), and `count` of them per direction of translation.
    """
    rng = generator(seed, "tasks", split)
    spoken = pools.pieces["speech"] if split == "train" else pools.speech()
    lines = [_line(f"asr_{piece.language}", "asr", piece, piece.text, pools) for piece in spoken]
    for heard, written in TRANSLATIONS:
        if {heard, written} <= set(languages):
            chosen = _translatable(pools, heard, written, rng)[: None if split == "train" else count]
            lines += [
                _line(f"s2tt_{heard}_{written}", "s2tt", piece, target, pools, text_language=written)
                for piece, target in chosen
            ]
    names = load_yaml("dialogues")["names"]
    genders = 3 * count if split == "train" else count  # two values that a recogniser learns to ignore: hard
    for piece in balanced(pools.speech(), lambda p: p.language, count, rng):
        lines.append(_line("lid", "lid", piece, names["languages"][piece.language], pools))
    for piece in balanced(pools.speech(), lambda p: (p.gender, p.language), genders, rng):
        lines.append(_line("sgc", "sgc", piece, piece.gender, pools))
    lines += [_line("sec", "sec", piece, piece.label, pools, text_language="en") for piece in pools.pieces["sound"]]
    lines += [_line("asc", "asc", piece, piece.label, pools, text_language="en") for piece in pools.pieces["scene"]]
    for piece in pools.pieces["note"]:
        lines.append(_line("mnc", "mnc", piece, f"{piece.label}, note {piece.note}", pools, text_language="en"))
    return _unique(lines + _question_lines(pools, 2 * count, rng))


def _translatable(pools: Pools, heard: str, written: str, rng: np.random.Generator) -> list[tuple[Piece, str]]:
    """Sentences in one language with their text in another, shuffled; not all of English is parallel."""
    sentences = [p for p in pools.speech(heard, origins=("sentence",)) if f"text_{written}" in p.facts]
    return [(sentences[i], sentences[i].facts[f"text_{written}"]) for i in rng.permutation(len(sentences))]


def _question_lines(pools: Pools, count: int, rng: np.random.Generator) -> list[Line]:
    lines = []
    for kind in QUESTION_KINDS:
        for piece, answer in balanced(candidates(kind, pools), lambda c: c[1], count // len(QUESTION_KINDS), rng):
            line = _line("aqa", "aqa", piece, answer, pools, question=written_question(kind, rng))
            line["id"] = f"aqa/{kind}/{piece.id.split('/', 1)[1]}"
            line["meta"]["kind"] = kind
            lines.append(line)
    return lines


def _unique(lines: list[Line]) -> list[Line]:
    """The lines without repeats of an id (a small pool may be asked for more than it has)."""
    return list({line["id"]: line for line in lines}.values())
