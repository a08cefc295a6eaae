"""Do our scores agree with those of independently installed packages? Pairs of texts in nine languages, scored twice.

    python -m venv ref && ref/bin/pip install jiwer sacrebleu[ja] scikit-learn whisper-normalizer kaldialign zhconv
    ref/bin/pip install --no-deps lmms-eval editdistance loguru
    python benchmarks/scoring_agreement.py --python ref/bin/python        # 10 000 pairs

The pairs are generated: numbers, punctuation, fillers, compounds, Han and Kana, full-width forms, tags, empty and
repeated texts. What the other side computes is in external/scores.py, which imports nothing of this project. Compared
are the normalised words of every text, the edits of every pair by three recipes, BLEU and accuracy of every group of a
hundred pairs, and the letters read from answers to questions with options. Every difference is printed. The result is
results/scoring_agreement.json, and a sample of pairs with the other side's scores, which a test holds ours against.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import RESULTS, save

from qwen2audio_train.evaluation.scoring import metrics
from qwen2audio_train.evaluation.scoring.normalise import PER_CHARACTER, units
from qwen2audio_train.evaluation.scoring.recipes import BESIDE, REFERENCE

OTHER_SIDE = Path(__file__).parent / "external" / "scores.py"
SAMPLE = 270
"""Pairs that are kept for the test."""

GROUP = 100
"""Pairs whose BLEU is taken together."""

WORDS = {
    "en": "the cat sat colour color mister Mr. won't gonna it's he's uh um twenty-five 25 one hundred and five $20 "
    "£3.50 1,000 2nd third 1960s o'clock ice cream icecream back yard backyard (laughs) [noise] naïve per cent 50% @",
    "zh": "我 今年 25 岁 2024年3月8日 增长 了 3.5% 百分之三 1/3 13812345678 010-12345678 1,000 个 两百 200 克 10 元 "
    "5块 ２０ ％ ＡＢＣ B2B Wi-Fi 你好 ， 。 ！ 呃 啊 那边儿 《书》 ~ 😀 20002 007 98年 第 二",
    "yue": "我哋 學習 嘅 25 歲 乜嘢 係 唔 佢 ， 。 臺灣 喺 呢度 嗯 啊 香港 ＡＢＣ 3.5% 100 蚊 萬 云 雲",
    "fr": "l'été où est-ce là-bas œuvre cœur 3,5 % 1 000 quatre-vingt-dix euh « oui » élève Élève n° 2e 12h30",
    "de": "Größe straße STRASSE 3,5 % Donau dampf schiff Dampfschiff äh ähm Übung über 1.000 21. „ja“ z.B.",
    "es": "¿qué ¡hola! niño año 3,5 % mil veintidós eh este 1.000 él Él señor 2ª pingüino — N.º",
    "it": "perché è l'uomo 3,5 % città ehm uno duemila 1.000 così È un'ora dell'anno 2° — «sì»",
    "ja": "今日 は 、 。 コーヒー ｺｰﾋｰ を 飲みました 25 歳 二十五 えっと あの 東京 とうきょう 「はい」 ー カ゛ ガ",
    "ko": "안녕하세요 저는 25 살 이십오 음 어 커피 를 마셨어요 . , ! 서울 １００ % 한국어 “네” 학교에",
}
TAGS = ("<|en|>", "<|0.00|>", "<|endoftext|>", "<|zh|>")


def pairs(count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """(language, reference, hypothesis), the languages in turn."""
    rng = random.Random(seed)
    for index in range(count):
        language = list(WORDS)[index % len(WORDS)]
        words = WORDS[language].split(" ")
        said = [rng.choice(words) for _ in range(rng.choice((0, 1, 2, *range(3, 14), *range(3, 14))))]
        yield language, _text(rng, said, language), _text(rng, _misheard(rng, said, words), language)


ANSWERS = (
    *("{a}", "{a}.", "({a})", "({a}) rain", "{a}. rain", "{a}: rain", "{a}) rain", "**{a}**", "\n{a}", "{a} rain"),
    *("The answer is {a}.", "The answer is ({a}).", "I think {a}", "Option {a}", "answer: {a}", "I hear it: {a}"),
    *("{a} or {b}", "It is either {a} or {b}", "{b} is wrong, so {a}", "rain", "A dog barks", "a", "I", "{b}'s"),
)


def answers(count: int, seed: int = 0) -> list[str]:
    """Answers to questions with the options A to D."""
    rng = random.Random(seed)
    drawn = [(rng.choice(ANSWERS), rng.sample("ABCD", 2)) for _ in range(count)]
    return [form.format(a=a, b=b) for form, (a, b) in drawn]


def _misheard(rng: random.Random, said: list[str], words: list[str]) -> list[str]:
    """The words with some dropped, replaced, repeated, run together or in another case; or nothing, or one for ever."""
    kind = rng.random()
    if kind < 0.03:
        return []
    if kind < 0.06:
        return [rng.choice(words)] * rng.randint(20, 60)
    heard: list[str] = []
    for word in said:
        change = rng.choice(("drop", "replace", "repeat", "join", "case", *["keep"] * 12))
        kept = {"drop": [], "replace": [rng.choice(words)], "repeat": [word, word], "case": [word.swapcase()]}
        if change == "join" and heard:
            heard[-1] += word
        else:
            heard += kept.get(change, [word])
    return heard


def _text(rng: random.Random, words: list[str], language: str) -> str:
    """Words as a line of text: spaces or none where the language has none, now and then a tag or odd blanks."""
    joined = rng.choice(("", " ")) if language in PER_CHARACTER else rng.choice((" ", " ", " ", "  ", "\u3000"))
    text = joined.join(words)
    if rng.random() < 0.1:
        text = f"{rng.choice(TAGS)}{text}{rng.choice(TAGS)}"
    return text + rng.choice(("", "", ".", " !", "?", "\n"))


def our_scores(given: list[tuple[str, str, str]]) -> dict[str, Any]:
    """What external/scores.py computes, by the functions that evaluation uses."""
    scores: dict[str, Any] = {"words": [[units(ref, lang), units(hyp, lang)] for lang, ref, hyp in given]}
    for recipe in (REFERENCE, *BESIDE):
        counted = [metrics.edit_counts([ref], [hyp], [lang], recipe) for lang, ref, hyp in given]
        scores[recipe.name] = [[edits[0], lengths[0]] for edits, lengths in counted]
    groups = list(grouped(given))
    scores["bleu"] = [metrics.bleu(refs, hyps, lang, samples=0).value for lang, refs, hyps in groups]
    scores["exact"] = [metrics.accuracy(refs, hyps, exact=True, samples=0).value for _, refs, hyps in groups]
    scores["letters"] = [metrics.chosen_letter(answer) for answer in answers(len(given) // 10)]
    return scores


def grouped(given: list[tuple[str, str, str]]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Per language, references and hypotheses by the hundred."""
    for language in WORDS:
        own = [(ref, hyp) for lang, ref, hyp in given if lang == language]
        for start in range(0, len(own), GROUP):
            some = own[start : start + GROUP]
            yield language, [ref for ref, _ in some], [hyp for _, hyp in some]


def their_scores(given: list[tuple[str, str, str]], python: str) -> dict[str, Any]:
    """The same by the packages of another interpreter."""
    asked = json.dumps({"pairs": given, "groups": list(grouped(given)), "answers": answers(len(given) // 10)})
    done = subprocess.run([python, str(OTHER_SIDE)], input=asked, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, list[int]]:
    """Per figure, the places where the two sides are not equal (to 1e-9 for scores)."""
    return {
        name: [i for i, (a, b) in enumerate(zip(values, theirs[name], strict=True)) if not _equal(a, b)]
        for name, values in ours.items()
    }


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, float):
        return abs(first - second) < 1e-9
    if first is None or (isinstance(first, str) and len(second) > 1):
        return True  # we count an answer as unparsed, or they guess at random: counted by `explained`
    return [first] == second if isinstance(first, str) else first == second


def explained(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, int]:
    """Answers that only one side reads: the other guesses at random, or takes the last of several letters."""
    read = list(zip(ours["letters"], theirs["letters"], strict=True))
    return {
        "unparsed here, guessed there": sum(our is None and len(their) > 1 for our, their in read),
        "several letters: unparsed here, the last one there": sum(
            our is None and len(their) == 1 for our, their in read
        ),
        "read here, guessed there": sum(our is not None and len(their) > 1 for our, their in read),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter in which the other packages are installed")
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    given = list(pairs(options.count))
    ours, theirs = our_scores(given), their_scores(given, options.python)
    found = differences(ours, theirs)
    for name, places in found.items():
        print(f"{name}: {len(places)} of {len(ours[name])} differ")
        for place in places[:5]:
            print("   ", given[place] if len(ours[name]) == len(given) else "", ours[name][place], theirs[name][place])
    kept = {name: theirs[name][:SAMPLE] for name in ("words", "reference", "strict", "open_asr")}
    sample = json.dumps({"pairs": given[:SAMPLE], **kept}, ensure_ascii=False)
    (RESULTS / "scoring_agreement.sample.json").write_text(sample + "\n", encoding="utf-8")
    save(
        "scoring_agreement",
        {
            "pairs": len(given),
            "languages": dict(Counter(language for language, *_ in given)),
            "compared": {name: len(values) for name, values in ours.items()},
            "different": {name: len(places) for name, places in found.items()},
            "explained": {"letters": explained(ours, theirs)},
            "other_versions": theirs["versions"],
        },
    )


if __name__ == "__main__":
    main()
