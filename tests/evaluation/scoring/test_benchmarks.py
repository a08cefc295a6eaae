from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.data.prompts.render import Text, render
from qwen2audio_train.evaluation.reporting.results import read_result
from qwen2audio_train.evaluation.reporting.results_page import render_results
from qwen2audio_train.evaluation.reporting.results_text import results_table
from qwen2audio_train.evaluation.reporting.stage_record import save_stage
from qwen2audio_train.evaluation.scoring import captions
from qwen2audio_train.evaluation.scoring.benchmarks import benchmarks
from qwen2audio_train.evaluation.scoring.evaluate import evaluation_of, save, table

ROOT = Path(__file__).parents[3]
PUBLISHED = ROOT.parent / "shared" / "design" / "published.yaml"
CLIP = Clip("a.wav", 1.0)
PROMPTS = {
    "librispeech_test_clean": "Detect the language and recognize the speech: <|en|>",
    "covost2_en_de": "Detect the language and translate the speech into German: <|en|>",
    "meld": "Recognize the emotion with keywords in English:",
    "vocalsound": "Classify the human vocal sound to VocalSound in English:",
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_the_published_evaluation(name):
    rendered = render(benchmarks()[name].example("1", CLIP, "x"), for_generation=True)
    text = "".join(piece.text for piece in rendered.trunk if isinstance(piece, Text))
    assert text == "<|audio_bos|><|audio_eos|>" + PROMPTS[name]


@pytest.mark.parametrize("name", benchmarks())
def test_every_benchmark_can_be_asked(name):
    benchmark = benchmarks()[name]
    choices = ["a dog", "rain"] if benchmark.metric in ("letter", "choice") else ()
    example = benchmark.example("1", CLIP, "rain", question="What is heard?", choices=choices)
    assert example.source == name
    text = "".join(p.text for p in render(example).trunk if isinstance(p, Text))
    assert ("What is heard?" in text) == ("{question}" in benchmark.prompt or benchmark.task == "aqa")
    if benchmark.metric == "letter":
        assert "A. a dog\nB. rain" in text
        assert example.messages[-1].content == ("B",)
    else:
        assert "rain" in text


SPLIT = {"touchnet_base_as_is": "touchnet_base"}
AIRBENCH = {"qwen2_audio_paper": "paper", "qwen2_audio_instruct_converted": "converted"}
OTHERS = {
    "qwen2_audio_instruct_declared": "declared",
    "remeasured_by_others": "remeasured",
    "r1_aqa_grpo": "r1_aqa",
}
NOT_SHOWN = {
    (
        "airbench_chat_mixed",
        "qwen_audio as printed",
    ): "the average of the four columns; AIR-Bench's own figure stands there",
    ("airbench_chat_mixed", "blsp as printed"): "the same",
    ("airbench_chat_mixed", "pandagpt as printed"): "the same",
}
"""Collected figures that no row shows, and why."""

Row = tuple[str, str, float]


def collected(table: dict[str, Any]) -> Iterator[Row]:
    """(benchmark, system, figure in the unit of benchmarks.yaml) for every figure of the collected table."""
    for corpus, entry in table["asr_wer"].items():
        for who in entry.keys() - {"splits", "note"}:
            for split, percent in zip(entry["splits"], entry[who], strict=True):
                if percent is not None:
                    yield f"{corpus}_{split.replace('-', '_')}", SPLIT.get(who, who), percent / 100
    for who in ("paper", "converted"):
        pairs = table["s2tt_bleu"]["covost2"]
        for pair, points in zip(pairs["pairs"], pairs[who], strict=True):
            yield f"covost2_{pair.replace('-', '_')}", who, points
    for section in ("ser_accuracy", "vsc_accuracy", "asc_accuracy", "aqa_accuracy"):
        for name, entry in table[section].items():
            for who, share in entry.items():
                is_binary = who.endswith("_binary")
                yield (f"{name}_binary" if is_binary else name), who.removesuffix("_binary"), share
    caption = table["aac"]["clotho"]["qwen_audio"]
    yield "clotho_captions", "qwen_audio", caption["cider"]
    yield from ((f"clotho_captions {name}", "qwen_audio", caption[name]) for name in ("spice", "spider"))
    yield "nsynth_instrument", "qwen_audio", table["mnc"]["nsynth"]["qwen_audio"]["instrument_accuracy"]
    yield "nsynth_qualities", "qwen_audio", table["mnc"]["nsynth"]["qwen_audio"]["qualities_map"]
    yield "srwt_industrial_zh", "qwen_audio", table["srwt_aas_ms"]["industrial_zh"]["qwen_audio"]
    for who, entry in table["airbench_chat"].items():
        entry = {"as_printed": entry} if isinstance(entry, list) else entry
        printed = (
            entry.get("as_printed") or entry.get("as_printed_in_the_paper") or [None] * 3 + [entry["as_printed_mixed"]]
        )
        better = entry.get("mixed_according_to_airbench")
        for kind, score in zip(("speech", "sound", "music", "mixed"), printed, strict=True):
            if score is not None:
                replaced = kind == "mixed" and better is not None
                yield f"airbench_chat_{kind}", f"{who} as printed" if replaced else AIRBENCH.get(who, who), score
        if better is not None:
            yield "airbench_chat_mixed", who, better
    for who in ("random_forest", "cnn", "people"):
        yield "esc10", who, table["small_corpora"]["esc10_accuracy"][who]
    for name, entry in table["others"].items():
        unit = 1 if name == "voicebench_overall" else 100
        for who in entry.keys() - {"version", "source"}:
            yield name.removesuffix("_overall"), OTHERS.get(who, who), entry[who] / unit


def numbers(value: Any) -> int:
    """How many figures a part of the table has."""
    if isinstance(value, dict | list):
        return sum(map(numbers, value.values() if isinstance(value, dict) else value))
    return int(isinstance(value, int | float))


def test_every_collected_figure_stands_beside_the_users_or_is_left_out_by_name():
    if not PUBLISHED.exists():
        pytest.skip("the collected table is not here")
    table = yaml.safe_load(PUBLISHED.read_text())
    rows = list(collected(table))
    assert len(rows) == len({row[:2] for row in rows}) == numbers(table), "none is passed over here"
    for name, who, figure in rows:
        if (name, who) in NOT_SHOWN:
            continue
        name, _, metric = name.partition(" ")
        benchmark = benchmarks()[name]
        known = benchmark.also[metric] if metric else benchmark.published
        assert known[who] == pytest.approx(figure), (name, who)


@pytest.mark.parametrize("name", [name for name, b in benchmarks().items() if b.metric != "judge"])
def test_every_number_says_how_it_was_scored_and_asked(name, tmp_path, monkeypatch):
    """From the score to metrics.json, the stage's record, the table, the report and the card; an answer that nobody can
    read is counted, and right by no guess."""
    monkeypatch.setattr(captions, "JAVA", "no such program")  # 15 s
    benchmark = benchmarks()[name]
    needs = {"captions": "pycocoevalcap"}.get(benchmark.metric) or {"yue": "zhconv"}.get(benchmark.language or "")
    if needs:
        pytest.importorskip(needs)
    choices = ["a dog", "rain"] if benchmark.metric in ("letter", "choice", "map") else ()
    target = "<|0.10|>rain<|0.50|>" if benchmark.metric == "timestamps" else "rain"
    examples = [benchmark.example(str(i), CLIP, target, question="What?", choices=choices) for i in range(3)]
    if benchmark.metric == "captions":
        examples = [replace(example, meta={"references": ["rain", "it rains"]}) for example in examples]
    found = evaluation_of(examples, ["?!", "", "no idea"], {}, settings={}, bootstrap_samples=10)
    assert found.rows
    for row in found.rows:
        stamp, _, version = row.scoring.rpartition("/")
        assert stamp
        assert int(version) >= 1
        assert row.prompt == benchmark.stamp
    main = found.rows[0].score
    if benchmark.metric in ("accuracy", "exact_accuracy", "choice", "letter", "map", "timestamps"):
        assert main.extra["unparsed"] == 3.0, "none of the three answers"
    if benchmark.metric in ("accuracy", "exact_accuracy", "choice", "letter"):
        assert main.value == 0.0
    save(found, tmp_path)
    save_stage(found, {}, tmp_path)
    saved = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    recorded = json.loads((tmp_path / "stage.json").read_text())["metrics"]
    stamps = [(row.scoring, row.prompt) for row in found.rows]
    assert [(row["scoring"], row["prompt"]) for row in saved] == stamps
    assert [(row["scoring"], row["prompt"]) for row in recorded] == stamps
    result = read_result("mine", tmp_path)
    assert {row[-2:] == [*stamp] for row, stamp in zip(results_table([result])[1], stamps, strict=True)} == {True}
    page = render_results([result], "x")
    for text in (table(found.rows), page):
        assert text.count(benchmark.stamp) >= len(stamps)


def test_a_card_is_named_that_is_there():
    cards = {path.stem for path in (ROOT / "data_manifests" / "cards").glob("*.yaml")}
    assert {benchmark.card for benchmark in benchmarks().values() if benchmark.card} <= cards


def test_base_style_is_the_task_form():
    assert isinstance(benchmarks()["meld"].example("1", CLIP, "joy"), TaskExample)
