from __future__ import annotations

import json

import pytest

from qwen2audio_train.evaluation.reporting.compare import compare, comparison_table


def write(folder, records):
    folder.mkdir()
    keys = ("id", "source", "task", "language", "reference", "text")
    lines = (json.dumps(dict(zip(keys, record, strict=True))) + "\n" for record in records)
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
    found = {c.source: c for c in compare(write(tmp_path / "1", first), write(tmp_path / "2", second))}
    assert found.keys() == {"asr_en", "voice_chat"}
    better, same = found["asr_en"], found["voice_chat"]
    assert (better.metric, better.n) == ("wer", 40)
    assert better.difference.value == pytest.approx(-1 / 6)
    assert better.difference.high < 0
    assert better.difference.p_value == 0.0
    assert same.difference.value == pytest.approx(-1 / 40)
    assert same.difference.p_value > 0.05
    assert "-16.7" in comparison_table(list(found.values()))
