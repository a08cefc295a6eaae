from __future__ import annotations

import json

import pytest

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.evaluation.reporting.compare import compare, compare_all, comparison_table


def write(folder, records):
    folder.mkdir()
    keys = ("id", "source", "task", "language", "reference", "text")
    metric = {"asr": "error_rate", "s2tt": "bleu", "voice_chat": "accuracy", "chat": None}
    rest = {"text_language": None, "question": None, "meta": {}}
    fields = (dict(zip(keys, record, strict=True)) for record in records)
    lines = (json.dumps({**rest, **one, "metric": metric[one["task"]]}) + "\n" for one in fields)
    (folder / "texts.jsonl").write_text("".join(lines))
    return folder


def test_runs_are_paired_by_id_and_compared_per_source(tmp_path):
    common = [(f"a{i}", "asr_en", "asr", "en", "the cat sat") for i in range(40)]
    chats = [(f"c{i}", "voice_chat", "voice_chat", None, "small.") for i in range(40)]
    translated = ("s", "s2tt_en_de", "s2tt", "en", "hallo", "hallo")
    unanswered = ("u", "open", "chat", None, None, "hm")
    first = [(*r, "the cat") for r in common] + [(*c, "small") for c in chats] + [translated, unanswered]
    second = [(*r, "the cat sat" if i % 2 else "the cat") for i, r in enumerate(reversed(common))]
    second += [(*c, "small" if i else "big") for i, c in enumerate(chats)] + [translated, unanswered]
    second.append(("new", "asr_en", "asr", "en", "a", "b"))
    compared = compare(write(tmp_path / "1", first), write(tmp_path / "2", second))
    found = {c.source: c for c in compared.comparisons}
    assert found.keys() == {"asr_en", "voice_chat"}
    better, same = found["asr_en"], found["voice_chat"]
    assert (better.metric, better.n) == ("wer", 40)
    assert better.difference.value == pytest.approx(-1 / 6)
    assert better.difference.high < 0
    assert better.difference.p_value == 0.0
    assert same.difference.value == pytest.approx(-1 / 40)
    assert same.difference.p_value > 0.05
    text = comparison_table(compared)
    assert "-16.7" in text
    assert (compared.only_first, compared.only_second) == (0, 1)
    assert "not compared: s2tt_en_de" in text


def test_another_held_out_set_is_refused(tmp_path):
    first = write(tmp_path / "1", [("a", "s", "asr", "en", "the cat", "the cat")])
    with pytest.raises(ConfigError, match="another reference"):
        compare(first, write(tmp_path / "2", [("a", "s", "asr", "en", "the dog", "the cat")]))
    with pytest.raises(ConfigError, match="no example in common"):
        compare(first, write(tmp_path / "3", [("b", "s", "asr", "en", "the cat", "the cat")]))
    with pytest.raises(ConfigError, match=r"no texts\.jsonl here"):
        compare(first, tmp_path)


def test_multiple_choice_is_compared_by_the_rule_that_scores_it(tmp_path):
    def run(folder, text):
        item = {"id": "a", "source": "mmau_test_mini", "task": "aqa", "language": None, "text_language": None}
        rest = {"question": "?", "reference": "a dog", "metric": "choice", "meta": {"choices": ["a dog", "rain"]}}
        folder.mkdir()
        (folder / "texts.jsonl").write_text(json.dumps({**item, **rest, "text": text}) + "\n")
        return folder

    (found,) = compare(run(tmp_path / "1", "rain"), run(tmp_path / "2", "It is a dog.")).comparisons
    assert found.difference.value == 1.0


def test_the_counts_of_several_runs_are_summed_per_utterance(tmp_path):
    """Two seeds: one loses a word of three in every utterance, the other none; n stays the number of utterances."""
    common = [(f"a{i}", "asr_en", "asr", "en", "the cat sat") for i in range(10)]
    right, wrong = ([(*r, text) for r in common] for text in ("the cat sat", "the cat"))
    folders = [write(tmp_path / str(i), texts) for i, texts in enumerate([right, wrong, right, right])]
    pairs = [(folders[0], folders[1]), (folders[2], folders[3])]
    (found,) = compare_all(pairs).comparisons
    assert found.n == 10
    assert found.difference.value == found.difference.low == found.difference.high == pytest.approx(1 / 6)
    other = write(tmp_path / "other", [("a0", "asr_en", "asr", "en", "the dog", "the cat")])
    with pytest.raises(ConfigError, match="another reference"):
        compare_all([pairs[0], (folders[2], other)])
