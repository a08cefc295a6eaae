"""Text normalisation before scoring, as the reference scripts of Qwen2-Audio do it.

Tags of the form `<|...|>` go. Then, by language: `en` Whisper's English normaliser and after it the basic one (that
the second follows the first is a quirk which the published figures contain); `zh` spaces out, numbers read aloud,
punctuation out; `yue` converted to simplified characters, then the basic normaliser; all others the basic one.
Chinese, Cantonese and Japanese are scored per character, the rest per word.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from qwen2audio_train.errors import MissingLibraryError

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


# Chinese: numbers are read aloud, so that "25%" and "百分之二十五" are the same answer.

_DIGITS = "零一二三四五六七八九"
_PLACES = ("", "十", "百", "千")
_MYRIADS = ("", "万", "亿", "万亿")
_MEASURES = "个只位名人元块次倍万亿米克吨里岁斤种件条台家所座套份年月天日时分秒"
_NUMBER = r"\d+(?:\.\d+)?"


def normalise_chinese(text: str) -> str:
    """Chinese `text` without spaces and punctuation, numbers written in characters, Latin letters in lower case."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(\d{4}|\d{2})(?=年)", lambda m: _spell(m[1]), text)
    text = re.sub(rf"({_NUMBER})%", lambda m: "百分之" + _read(m[1]), text)
    text = re.sub(r"(\d+)/(\d+)", lambda m: f"{_read(m[2])}分之{_read(m[1])}", text)
    text = re.sub(rf"({_NUMBER})(?=([{_MEASURES}])?)", lambda m: _read(m[1], counted=bool(m[2])), text)
    return "".join(c for c in text if unicodedata.category(c)[0] in "LNM")


def _read(number: str, counted: bool = True) -> str:
    """A decimal number as it is read: `105` 一百零五, `3.5` 三点五; long and uncounted ones digit by digit."""
    whole, _, fraction = number.partition(".")
    if fraction:
        return f"{_cardinal(whole)}点{_spell(fraction)}"
    is_code = len(whole) > 1 and whole[0] == "0"
    if is_code or len(whole) > 16 or (len(whole) > 3 and not counted):
        return _spell(whole)
    return _cardinal(whole)


def _spell(digits: str) -> str:
    return "".join(_DIGITS[int(d)] for d in digits)


def _cardinal(digits: str) -> str:
    digits = digits.lstrip("0") or "0"
    if digits == "0":
        return _DIGITS[0]
    read, skipped_zero, in_myriad = "", False, False
    for place, digit in zip(range(len(digits) - 1, -1, -1), digits, strict=True):
        if digit == "0":
            skipped_zero = True
        else:
            read += ("零" if skipped_zero else "") + _DIGITS[int(digit)] + _PLACES[place % 4]
            skipped_zero, in_myriad = False, True
        if place % 4 == 0 and in_myriad:
            read += _MYRIADS[place // 4]
            in_myriad = False
    return read.removeprefix("一") if read.startswith("一十") else read
