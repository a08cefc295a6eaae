"""Sentences from a synchronous template grammar: the same content in several languages, with a fixed held-out part.

The words and templates are data (grammar/*.yaml); their notation is explained at the head of grammar/core.yaml.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qwen2audio_train.selfmade.draw import uniform

HELD_OUT_SHARE = 0.15
"""Share of all sentences that is kept for the held-out set."""

_SLOT = re.compile(r"\{(\w+)(?:\.(\w+)|:(\w+)(?:\+(\w+))?)?\}")


@dataclass(frozen=True)
class Word:
    """One row of the lexicon: per language, the named forms of a word."""

    category: str
    unseen: bool
    forms: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Sentence:
    """The same sentence in several languages; `kind` (the section) and `words` tell how it was made."""

    kind: str
    texts: Mapping[str, str]
    words: tuple[Word, ...]

    @property
    def has_unseen_word(self) -> bool:
        """Whether a word is used that the training set must not hold."""
        return any(word.unseen for word in self.words)


def is_held_out(text: str) -> bool:
    """Whether a sentence belongs to the held-out set; a fact of its text, the same for every seed."""
    return uniform("held-out", text) < HELD_OUT_SHARE


@cache
def load_yaml(name: str) -> Any:
    """A file of grammar/, parsed."""
    return yaml.safe_load((Path(__file__).parent / "grammar" / f"{name}.yaml").read_text("utf-8"))


class Grammar:
    """The lexicon and the templates of one YAML file; of each category the first `share` of the words."""

    def __init__(self, name: str = "core", *, share: float = 1.0) -> None:
        self.spec = load_yaml(name)
        self.languages: list[str] = self.spec["languages"]
        self.lexicon = {
            category: self._words(category, entry, share) for category, entry in self.spec["lexicon"].items()
        }
        self.rewrites = {
            language: [(re.compile(pattern), new) for pattern, new in rules]
            for language, rules in self.spec.get("rewrites", {}).items()
        }

    def _words(self, category: str, entry: dict[str, Any], share: float) -> list[Word]:
        def parse(row: str, unseen: bool) -> Word:
            columns = row.split("|")
            if len(columns) != len(self.languages):
                raise ValueError(f"{category}: {row!r} has {len(columns)} columns, expected {self.languages}")
            forms = {}
            for language, column in zip(self.languages, columns, strict=True):
                names, values = entry["fields"][language].split(), column.split()
                if len(names) != len(values):
                    raise ValueError(f"{category}: {column!r} has {len(values)} fields, expected {names}")
                forms[language] = {n: v.replace("_", " ") for n, v in zip(names, values, strict=True)}
            return Word(category, unseen, forms)

        seen, unseen = entry["rows"], entry.get("unseen", [])
        first = [parse(row, False) for row in seen[: math.ceil(share * len(seen))]]
        return first + [parse(row, True) for row in unseen[: math.ceil(share * len(unseen))]]

    def words(self, categories: str | Iterable[str], *, unseen: bool) -> list[Word]:
        """Words of the categories; those of the held-out set only where `unseen`."""
        names = [categories] if isinstance(categories, str) else list(categories)
        return [word for name in names for word in self.lexicon[name] if unseen or not word.unseen]

    def surface(self, template: str, language: str, slots: Mapping[str, Word]) -> str:
        """Fill a template of `language` with words."""

        def fill(match: re.Match[str]) -> str:
            name, form, other, suffix = match.groups()
            if other is not None:
                form = slots[other].forms[language]["key"] + (suffix or "")
                if name not in slots:
                    return str(self.spec["tables"][name][language][form])
            forms = slots[name].forms[language]
            if form is None or len(forms) == 1:
                return next(iter(forms.values()))
            return forms[form]

        text = _SLOT.sub(fill, template)
        for pattern, new in self.rewrites.get(language, ()):
            text = pattern.sub(new, text)
        return text

    def sample(self, section: str, rng: np.random.Generator, *, unseen: bool = False) -> Sentence:
        """One sentence of a section (`phrases`, `sentences`); with `unseen` it holds exactly one unseen word."""
        templates = self.spec[section]
        while True:
            template = templates[rng.integers(len(templates))]
            slots = {name: self._choose(kind, rng) for name, kind in template["slots"].items()}
            if unseen:
                name = list(slots)[rng.integers(len(slots))]
                pool = [word for word in self.words(template["slots"][name], unseen=True) if word.unseen]
                if not pool:
                    continue
                slots[name] = pool[rng.integers(len(pool))]
            if len({id(word) for word in slots.values()}) == len(slots):
                return self.sentence(section.removesuffix("s"), template, slots)

    def _choose(self, kind: str | list[str], rng: np.random.Generator) -> Word:
        pool = self.words(kind, unseen=False)
        return pool[rng.integers(len(pool))]

    def sentence(self, kind: str, template: Mapping[str, Any], slots: Mapping[str, Word]) -> Sentence:
        """A template filled in every language that it has."""
        texts = {lang: self.surface(template[lang], lang, slots) for lang in self.languages if lang in template}
        return Sentence(kind, texts, tuple(slots.values()))

    def singles(self, language: str) -> list[str]:
        """Every word (or fixed phrase) of the seen lexicon in each of its forms, alone."""
        found = {
            value: None
            for words in self.lexicon.values()
            for word in words
            if not word.unseen
            for name, value in word.forms[language].items()
            if name != "key"
        }
        return list(found)


def distinct(
    sentences: Iterator[Sentence], count: int, language: str, *, held_out: bool, taken: frozenset[str] = frozenset()
) -> list[Sentence]:
    """The first `count` sentences of a stream that are new in `language` and on the asked side of the split.

    The split goes by the English text, so that a translation is on the same side. `taken`: texts not to be used.
    """
    chosen: dict[str, Sentence] = {}
    for sentence in itertools.islice(sentences, 200 * count + 1000):
        if len(chosen) == count:
            return list(chosen.values())
        text = sentence.texts[language]
        if text in taken or (is_held_out(sentence.texts["en"]) or sentence.has_unseen_word) != held_out:
            continue
        chosen.setdefault(text, sentence)
    raise ValueError(f"the grammar gave only {len(chosen)} of {count} distinct sentences in {language}")
