"""Text normalisation before scoring, as the reference scripts of Qwen2-Audio do it.

Tags of the form `<|...|>` go. Then, by language: `en` Whisper's English normaliser and after it the basic one (that
the second follows the first is a quirk which the published figures contain); `zh` spaces out, numbers as they are read,
punctuation out (chinese.py); `yue` converted to simplified characters, then the basic normaliser; all others the basic
one. Chinese, Cantonese and Japanese are scored per character, the rest per word.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import re
from collections.abc import Iterable
from functools import cache

from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.evaluation.scoring.chinese import normalise_chinese

PER_CHARACTER = frozenset({"zh", "yue", "ja"})
"""Languages written without spaces: error rates count characters."""

_TAG = re.compile(r"<\|.*?\|>")
_SPACE_BEFORE_PUNCTUATION = re.compile(r" ([!,.?;:])")
_BASIC = BasicTextNormalizer()


def normalise(text: str, language: str | None) -> str:
    """`text` as it is scored in `language` (an ISO code such as `en`, `zh`, `yue`; None: the basic normaliser)."""
    text = strip_tags(text)
    if language == "zh":
        return normalise_chinese(text)
    if language == "yue":
        text = _simplify(text)
    elif language == "en":
        text = _english()(text)
    return _BASIC(text).strip()


def open_asr(text: str, language: str | None) -> str:
    """`text` by the chain of the Open ASR leaderboard: Whisper's English normaliser, else the basic one.

    The leaderboard keeps a copy of Whisper's normaliser with small changes of its own, which is not repeated here.
    """
    text = strip_tags(text)
    return (_english()(text) if language in ("en", None) else _BASIC(text)).strip()


def units(text: str, language: str | None) -> list[str]:
    """The words, or in Chinese, Cantonese and Japanese the characters, that an error rate counts."""
    words = normalise(text, language).split()
    return list("".join(words)) if language in PER_CHARACTER else words


def strip_tags(text: str) -> str:
    """`text` without `<|...|>` tags, with single spaces and none before punctuation."""
    text = " ".join(_TAG.sub(" ", text).split())
    return _SPACE_BEFORE_PUNCTUATION.sub(r"\1", text)


def caveats(languages: Iterable[str | None]) -> list[str]:
    """What keeps scores in these languages from being exactly comparable with published ones; empty if nothing."""
    if "en" in set(languages) and not _spelling_map():
        return [
            "English: British and American spellings count as different words, because the spelling list of Whisper's "
            "normaliser is absent (pip install 'qwen2audio-train[evaluation]')."
        ]
    return []


@cache
def _english() -> EnglishTextNormalizer:
    return EnglishTextNormalizer(_spelling_map())


@cache
def _spelling_map() -> dict[str, str]:
    """Whisper's list of British spellings -> American ones, or nothing where `whisper_normalizer` is not installed."""
    try:
        package = importlib.resources.files("whisper_normalizer")
    except ModuleNotFoundError:
        return {}
    return json.loads((package / "normalizers" / "english.json").read_text(encoding="utf-8"))


def _simplify(text: str) -> str:
    try:
        zhconv = importlib.import_module("zhconv")
    except ModuleNotFoundError:
        raise MissingLibraryError(
            "Cantonese is scored in simplified characters, and the converter is not installed: "
            "pip install 'qwen2audio-train[evaluation]' (the package zhconv)."
        ) from None
    return zhconv.convert(text, "zh-cn")
