"""Our chain against scores of other packages, kept by benchmarks/scoring_agreement.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen2audio_train.evaluation.scoring.metrics import edit_counts
from qwen2audio_train.evaluation.scoring.normalise import units
from qwen2audio_train.evaluation.scoring.recipes import BESIDE, REFERENCE

KEPT = Path(__file__).parents[3] / "benchmarks" / "results" / "scoring_agreement.sample.json"


@pytest.fixture(scope="module")
def kept():
    pytest.importorskip("whisper_normalizer")
    pytest.importorskip("zhconv")
    return json.loads(KEPT.read_text(encoding="utf-8"))


def test_words_are_those_of_the_published_chain(kept):
    for (language, *texts), expected in zip(kept["pairs"], kept["words"], strict=True):
        assert [units(text, language) for text in texts] == expected
    assert {language for language, *_ in kept["pairs"]} == {"en", "zh", "yue", "fr", "de", "es", "it", "ja", "ko"}


@pytest.mark.parametrize("recipe", [REFERENCE, *BESIDE], ids=lambda recipe: recipe.name)
def test_edits_and_lengths_are_those_of_other_packages(kept, recipe):
    if not recipe.installed:
        pytest.skip(f"{recipe.extra} is not installed")
    for (language, reference, hypothesis), expected in zip(kept["pairs"], kept[recipe.name], strict=True):
        edits, lengths = edit_counts([reference], [hypothesis], [language], recipe)
        assert [edits[0], lengths[0]] == expected
