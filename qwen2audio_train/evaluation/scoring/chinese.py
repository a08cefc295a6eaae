"""Chinese before scoring: what is not a word is written as it is read, then punctuation goes.

A reading of the rules of cn_tn.py (speechio/chinese_text_normalization, Apache-2.0), which the scripts of the published
model use with all of its options off, quirks included: dates, money, telephone numbers, fractions, percentages, numbers
with a measure word, long numbers digit by digit, other numbers. Each rule looks at the text as it was before it, and
writes at the first place where what it found occurs. benchmarks/scoring_agreement.py compares it with the original.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable

_DIGITS = "零一二三四五六七八九"
_UNITS = tuple(zip((1, 2, 3, 4, *range(8, 48, 4)), "十百千万亿兆京垓秭穰沟涧正载", strict=True))
"""Powers of ten that have a character."""

_LARGE = "".join(unit for power, unit in _UNITS if power > 1)
_TWO = re.compile(rf"(?:^|(?<=[{_LARGE}]))二(?=[{_LARGE}])")
"""A two that is read 两."""

_CURRENCY = "((亿|千万|百万|万|千|百)|(亿|千万|百万|万|千|百|)元|(亿|千万|百万|万|千|百|)块|角|毛|分)"
_MEASURE = (
    "(匹|张|座|回|场|尾|条|个|首|阙|阵|网|炮|顶|丘|棵|只|支|袭|辆|挑|担|颗|壳|窠|曲|墙|群|腔|砣|客|贯|扎|捆|刀|令|打|手|罗|坡|山|岭|江|溪|"
    "钟|队|单|双|对|出|口|头|脚|板|跳|枝|件|贴|针|线|管|名|位|身|堂|课|本|页|家|户|层|丝|毫|厘|分|钱|两|斤|铢|石|钧|锱|忽|(千|毫|微)克|寸|尺|"
    "丈|里|寻|常|铺|程|(千|分|厘|毫|微)米|撮|勺|合|升|斗|盘|碗|碟|叠|桶|笼|盆|盒|杯|斛|锅|簋|篮|罐|瓶|壶|卮|盏|箩|箱|煲|啖|袋|钵|年|月|"
    "日|季|刻|时|周|天|秒|旬|纪|岁|世|更|夜|春|夏|秋|冬|代|伏|辈|丸|泡|粒|幢|堆|根|道|面|片|块)"
)
_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃《》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏·〈〉-"
    + string.punctuation
)
_BLANKS = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))


def normalise_chinese(text: str) -> str:
    """Chinese `text` with its numbers as they are read, without punctuation and spaces, in lower case."""
    text = read_aloud(re.sub(r"\s+", "", text)).translate(_BLANKS)
    return "".join(text.split()).lower()


def read_aloud(text: str) -> str:
    """`text` with dates, amounts and numbers written in characters."""
    text = f"^{text}$"
    for pattern, write in _RULES:
        for match in pattern.finditer(text):
            text = text.replace(match[1], write(match[1]), 1)
    return text.lstrip("^").rstrip("$")


def spell(digits: str) -> str:
    """Digit by digit: `105` 一零五."""
    return "".join(_DIGITS[int(digit)] for digit in digits)


def read_number(number: str) -> str:
    """A decimal number as it is read: `105` 一百零五, `2000` 两千, `12.5` 十二点五, `00` nothing."""
    whole, _, fraction = number.partition(".")
    text = spell(whole) if len(whole) == 1 else _cardinal(whole)
    if fraction:
        text += "点" + spell(fraction)
    text = _TWO.sub("两", text)
    if text.startswith("点"):
        return _DIGITS[0] + text
    return text[1:] if text.startswith("一十") else text


def _cardinal(digits: str) -> str:
    significant = digits.lstrip("0")
    if len(significant) <= 1:
        skipped = "零" if len(digits) > 1 and significant else ""
        return skipped + spell(significant)
    power, unit = next((power, unit) for power, unit in reversed(_UNITS) if power < len(significant))
    return _cardinal(digits[:-power]) + unit + _cardinal(significant[-power:])


def _date(date: str) -> str:
    year, has_year, rest = date.rpartition("年")
    month, has_month, day = rest.partition("月")
    text = spell(year) + has_year
    if has_month:
        text += read_number(month) + has_month
    return text + (read_number(day[:-1]) + day[-1] if day else "")


def _money(amount: str) -> str:
    for number in re.findall(r"\d+(?:\.\d+)?", amount):
        amount = amount.replace(number, read_number(number))
    return amount


def _telephone(number: str) -> str:
    return spell(re.sub(r"[-+\s]", "", number))


def _fraction(fraction: str) -> str:
    numerator, denominator = fraction.split("/")
    return f"{read_number(denominator)}分之{read_number(numerator)}"


def _percentage(share: str) -> str:
    return "百分之" + read_number(share.strip("%"))


def _narrow(_: str) -> str:
    return "%"


def _latin(word: str) -> str:
    return word.replace("二", "2")


_RULES: tuple[tuple[re.Pattern[str], Callable[[str], str]], ...] = (
    (re.compile(r"\D+((?:(?:[089]\d|(?:19|20)\d{2})年)?(?:\d{1,2}月(?:\d{1,2}[日号])?)?)"), _date),
    (re.compile(rf"\D+(\d+(?:\.\d+)?[多余几]?{_CURRENCY}(?:\d{_CURRENCY}?)?)"), _money),
    (re.compile(r"\D((?:\+?86 ?)?1(?:[38]\d|5[0-35-9]|7[678]|9[89])\d{8})\D"), _telephone),
    (re.compile(r"\D((?:0(?:10|2[1-3]|[3-9]\d{2})-?)?[1-9]\d{6,7})\D"), _telephone),
    (re.compile(r"(\d+/\d+)"), _fraction),
    (re.compile(r"(％)"), _narrow),
    (re.compile(r"(\d+(?:\.\d+)?%)"), _percentage),
    (re.compile(rf"(\d+(?:\.\d+)?)[多余几]?{_MEASURE}"), read_number),
    (re.compile(r"(\d{4,32})"), spell),
    (re.compile(r"(\d+(?:\.\d+)?)"), read_number),
    (re.compile(r"([a-zA-Z]+二[a-zA-Z]+)"), _latin),
)
"""In this order: what is found, and how it is written."""
