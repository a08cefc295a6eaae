"""Free English text for the synthesiser, sampled from a language model by launch/texts.py, and how it is cleaned.

In: what a language model wrote, or the files of this folder. Out: sentences, and questions with their answers.
Imports nothing of the project.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent

TOPICS = (
    *("the sea", "a village school", "an old house", "winter", "a train journey", "a doctor", "the market", "a dog"),
    *("a letter from a friend", "the war", "a garden", "cooking dinner", "money and work", "a storm", "a wedding"),
    *("the moon and the stars", "a horse", "two brothers", "a church", "music", "a king", "the forest", "breakfast"),
    *("a river", "a thief", "birds", "a city street", "football", "a lost child", "a birthday", "science", "health"),
    *("farming", "a ship", "a painter", "bread", "a mountain", "an argument", "sleep and dreams", "a grandmother"),
    *("the law", "fire", "a bridge", "summer", "a newspaper", "an island", "clothes", "a hotel", "the theatre"),
    "a soldier",
)

STYLES = {
    "sentences": (
        "Write a page of an old-fashioned novel about {}.",
        "Write a conversation between two friends about {}.",
        "Write a diary entry about {}.",
        "Tell me some facts about {}.",
        "Write a newspaper report about {}.",
        "Write a short story about {}. Use simple words.",
        "Give advice about {}.",
        "Ask ten questions about {}.",
    ),
    "questions": (
        "Write ten short questions that a child might ask about {}.",
        "Write ten short quiz questions about {}.",
        "Write ten short questions that people often ask about {}.",
    ),
}
"""What is asked of the language model, about each of `TOPICS`, for text of either kind."""

SYSTEM = "Answer in one short sentence."
"""What the language model is told before it answers a question."""

_WORDS = range(3, 27)
"""Words of a sentence: the longest last about 12 s."""

_ANSWER_WORDS = range(1, 21)


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of a text that can be read aloud as they are: letters and punctuation alone, 3 to 26 words."""
    text = text.replace("’", "'").replace("—", ", ").replace("–", ", ")
    for line in text.split("\n"):
        line = re.sub(r"^[\s\d.*#-]+", "", line).replace('"', "").replace("*", "")
        for sentence in re.split(r"(?<=[.?!])\s+", line):
            if re.fullmatch(r"[A-Za-z' ,.?!;:-]+[.?!]", sentence) and len(sentence.split()) in _WORDS:
                yield sentence.strip()


def answer_of(text: str) -> str | None:
    """The first sentence of an answer, if it ends within 20 words and can be spoken; else None."""
    first = re.split(r"(?<=[.?!])\s", text.strip().replace("’", "'"), maxsplit=1)[0]
    fits = re.fullmatch(r"[A-Za-z' ,;:-]+\.", first) and len(first.split()) in _ANSWER_WORDS
    return first if fits else None


def plain_words(sentence: str) -> str:
    """A sentence as transcripts have it: lower case, no punctuation but apostrophes."""
    return " ".join(re.sub(r"[^a-z' ]", " ", sentence.lower()).split())


@cache
def sentences() -> tuple[str, ...]:
    """The sentences of this folder."""
    return tuple((FOLDER / "sentences.txt").read_text("utf-8").splitlines())


@cache
def questions() -> tuple[tuple[str, str], ...]:
    """The questions of this folder and the language model's answers."""
    lines = map(json.loads, (FOLDER / "questions.jsonl").read_text("utf-8").splitlines())
    return tuple((line["question"], line["answer"]) for line in lines)
