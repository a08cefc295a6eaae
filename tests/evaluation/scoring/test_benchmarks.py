from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.data.prompts.render import Text, render
from qwen2audio_train.evaluation.scoring.benchmarks import benchmarks

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


def test_figures_are_those_of_the_collected_table():
    if not PUBLISHED.exists():
        pytest.skip("the collected table is not here")
    table, known = yaml.safe_load(PUBLISHED.read_text()), benchmarks()
    for corpus, entry in table["asr_wer"].items():
        for who, figures in entry.items():
            if who in ("splits", "note"):
                continue
            who = {"touchnet_base_as_is": "touchnet_base"}.get(who, who)
            for split, percent in zip(entry["splits"], figures, strict=True):
                name = f"{corpus}_{split.replace('-', '_')}"
                found = known[name].published.get(who)
                assert found == (None if percent is None else pytest.approx(percent / 100)), name
    for who in ("paper", "converted"):
        for pair, points in zip(
            table["s2tt_bleu"]["covost2"]["pairs"], table["s2tt_bleu"]["covost2"][who], strict=True
        ):
            assert known[f"covost2_{pair.replace('-', '_')}"].published[who] == points
        assert known["meld"].published[who] == table["ser_accuracy"]["meld"][who]
        assert known["vocalsound"].published[who] == table["vsc_accuracy"]["vocalsound"][who]
    for kind, paper, converted in zip(
        ("speech", "sound", "music", "mixed"),
        table["airbench_chat"]["qwen2_audio_paper"],
        table["airbench_chat"]["qwen2_audio_instruct_converted"],
        strict=True,
    ):
        published = known[f"airbench_chat_{kind}"].published
        assert (published["paper"], published["converted"]) == (paper, converted)


def test_a_card_is_named_that_is_there():
    cards = {path.stem for path in (ROOT / "data_manifests" / "cards").glob("*.yaml")}
    assert {benchmark.card for benchmark in benchmarks().values() if benchmark.card} <= cards


def test_base_style_is_the_task_form():
    assert isinstance(benchmarks()["meld"].example("1", CLIP, "joy"), TaskExample)
