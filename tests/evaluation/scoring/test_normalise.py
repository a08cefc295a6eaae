from __future__ import annotations

import sys

import pytest

from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.evaluation.scoring import normalise as module
from qwen2audio_train.evaluation.scoring.normalise import caveats, normalise, strip_tags, units


def test_tags_go_in_every_language():
    assert strip_tags("<|en|> Hello ,  world <|endoftext|>") == "Hello, world"
    assert normalise("<|de|>Guten Tag!", "de") == "guten tag"
    assert normalise("<|zh|>你好。", "zh") == "你好"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Smith won't pay $20 million, um, today.", "mister smith will not pay 20000000 today"),
        ("It's twenty-five past seven", "it is 25 past 7"),
        ("THE CAT (laughs) SAT", "the cat sat"),
        ("", ""),
    ],
)
def test_english_normaliser_then_the_basic_one(text, expected):
    assert normalise(text, "en") == expected


def test_the_basic_normaliser_after_the_english_one_is_what_takes_the_currency_sign():
    # Whisper's English normaliser alone leaves "$20"; the reference scripts run the basic one on top of it.
    assert normalise("$20", "en") == "20"


def test_other_languages_keep_their_letters():
    assert normalise("Où est-ce, là-bas?", "fr") == "où est ce là bas"
    assert normalise("Größe: 5", None) == "größe 5"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # each as the normaliser of the published scripts (speechio's cn_tn.py) writes it
        ("我 今年25岁。", "我今年二十五岁"),
        ("2024年3月8日", "二零二四年三月八日"),
        ("98年12月", "九八年十二月"),
        ("增长了3.5%", "增长了百分之三点五"),
        ("占1/3", "占三分之一"),
        ("电话13812345678", "电话一三八一二三四五六七八"),
        ("打010-12345678吧", "打零一零一二三四五六七八吧"),
        ("1,000个人", "一个人"),  # a quirk: 000 is read as nothing
        ("200个2000斤", "两百个两千斤"),
        ("110米", "一百一十米"),
        ("20300元", "两万零三百元"),
        ("0点", "零点"),
        ("007", "零七"),
        ("20002", "二零零零二"),
        ("B2B的Wi-Fi密码", "b2b的wifi密码"),
        ("ＡＢＣ，２０你好！", "ａｂｃ二十零你好"),
        ("5€😀", "五€😀"),
    ],
)
def test_chinese(text, expected):
    assert normalise(text, "zh") == expected


def test_units_are_characters_or_words():
    assert units("你 好吗?", "zh") == ["你", "好", "吗"]
    assert units("你 好吗?", "ja") == ["你", "好", "吗"]
    assert units("Good morning.", "de") == ["good", "morning"]
    assert units(" ", "zh") == []


def test_cantonese_without_the_converter_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "zhconv", None)
    with pytest.raises(MissingLibraryError, match="zhconv"):
        normalise("我哋", "yue")


def test_cantonese_is_simplified():
    pytest.importorskip("zhconv")
    assert normalise("我們學習", "yue") == "我们学习"


def test_absence_of_the_spelling_list_is_said(monkeypatch):
    monkeypatch.setattr(module, "_spelling_map", dict)
    assert "spelling" in caveats(["en", "de"])[0]
    assert caveats(["de", None]) == []


def test_spelling_list_is_used_where_it_is_installed():
    pytest.importorskip("whisper_normalizer")
    assert normalise("the colour", "en") == "the color"
    assert caveats(["en"]) == []
