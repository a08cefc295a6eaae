"""The page of benchmarks is what benchmarks.yaml says."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from qwen2audio_train.evaluation.reporting.benchmarks_page import HOW, WHO, page
from qwen2audio_train.evaluation.scoring.benchmarks import Metric, benchmarks

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_is_of_today():
    assert (DOCS / "benchmarks.md").read_text(encoding="utf-8") == page(), "run: make docs-keys"


def test_every_metric_and_every_figure_is_explained():
    assert set(HOW) == set(get_args(Metric))
    assert {who for benchmark in benchmarks().values() for who in benchmark.published} == set(WHO)


def test_a_row_says_how_it_is_asked_and_what_was_published():
    (row,) = [line for line in page().splitlines() if line.startswith("| librispeech_test_clean/")]
    assert "`Detect the language and recognize the speech: <\\|en\\|>`" in row
    assert "converted 0.017" in row
    (chat,) = [line for line in page().splitlines() if line.startswith("| mmau_test_mini/")]
    assert "`{question} / Choose one of these answers and write it in full: / {choices}`" in chat
