from __future__ import annotations

import math

import jiwer
import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2audio_train.evaluation.scoring import bootstrap, metrics

TEXTS = st.lists(st.text(alphabet="abc ", max_size=12), min_size=1, max_size=6)


def test_wer_is_the_corpus_rate_and_not_the_mean_of_utterances():
    references, hypotheses = ["a b c d e f g h", "a b"], ["a b c d e f g h", "x y"]
    score = metrics.error_rate(references, hypotheses, "de")
    assert score.metric == "wer"
    assert score.value == 2 / 10
    assert score.n == 2


@settings(deadline=None, max_examples=50)
@given(TEXTS, TEXTS)
def test_counts_agree_with_jiwer(references, hypotheses):
    n = min(len(references), len(hypotheses))
    references, hypotheses = references[:n], hypotheses[:n]
    edits, lengths = metrics.edit_counts(references, hypotheses, ["de"] * n)
    output = jiwer.process_words(references, hypotheses)
    assert sum(edits) == output.substitutions + output.insertions + output.deletions
    assert sum(lengths) == sum(len(r.split()) for r in references)


def test_chinese_is_scored_per_character():
    score = metrics.error_rate(["今天天气很好"], ["今天 天汽很好。"], "zh")
    assert (score.metric, score.value) == ("cer", 1 / 6)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        *(("B", "B"), ("(B) rain", "B"), ("B: rain", "B"), ("**B**", "B"), ("\nB.", "B"), ("B rain", "B")),
        *(("I think B", "B"), ("The answer is (C).", "C"), ("rain", None), ("I", None), ("B's", None)),
        *(("B or C", None), ("B is wrong, so C", None), ("B. Not C", "B"), ("E", None), ("", None)),
    ],
)
def test_the_letter_that_an_answer_names(answer, letter):
    assert metrics.chosen_letter(answer) == letter


def test_letters_go_as_far_as_the_options():
    assert [metrics.chosen_letter("I", count) for count in (4, 9)] == [None, "I"]


def test_empty_hypotheses_are_deletions_and_counted():
    score = metrics.error_rate(["a b", "c d"], ["", "c d"], "de")
    assert score.value == 0.5
    assert score.extra["empty_hypotheses"] == 1


def test_empty_reference_counts_insertions_and_no_length():
    assert metrics.edit_counts(["", "a"], ["x y", "a"], ["de"] * 2) == ([2, 0], [0, 1])


def test_nothing_to_score_is_not_a_number():
    for score in (metrics.error_rate([], [], "en"), metrics.accuracy([], []), metrics.bleu([], [], "de")):
        assert score.n == 0
        assert math.isnan(score.value)
        assert math.isnan(score.low)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        lengths = rng.integers(5, 15, size=60)
        score = bootstrap.ratio_score("wer", rng.binomial(lengths, 0.2), lengths, samples=200, seed=trial)
        covered += score.low <= 0.2 <= score.high
    assert 0.88 <= covered / 200 <= 0.99


def test_interval_is_a_function_of_the_seed():
    args = ("wer", [1, 0, 3, 2], [4, 5, 6, 7])
    assert bootstrap.ratio_score(*args, seed=1) == bootstrap.ratio_score(*args, seed=1)
    assert bootstrap.ratio_score(*args, seed=1) != bootstrap.ratio_score(*args, seed=2)


def test_blocks_of_draws_do_not_change_the_interval_width(monkeypatch):
    whole = bootstrap.ratio_score("wer", [1, 0, 3, 2], [4, 5, 6, 7])
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 12)
    assert bootstrap.ratio_score("wer", [1, 0, 3, 2], [4, 5, 6, 7]) == whole


def test_bleu_equals_sacrebleu():
    references = ["the cat sat on the mat .", "a quick brown fox jumps", "hello there"]
    hypotheses = ["the cat sat on a mat .", "a quick fox jumps over", ""]
    score = metrics.bleu(references, hypotheses, "en")
    assert score.value == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [references]).score, abs=1e-9)
    assert score.low <= score.value <= score.high


def test_bleu_into_chinese_uses_the_chinese_tokenizer():
    reference, hypothesis = ["我今天很高兴见到你们"], ["我今天很高兴见到他们"]
    expected = sacrebleu.corpus_bleu(hypothesis, [reference], tokenize="zh").score
    assert metrics.bleu(reference, hypothesis, "zh").value == pytest.approx(expected)


def test_accuracy_beside_chance_and_majority():
    references = ["dog", "dog", "cat", "cow"]
    score = metrics.accuracy(references, ["Dog.", "cat", "cat", ""], language="en")
    assert score.value == 0.5
    assert score.extra == {"chance": pytest.approx(1 / 3), "majority": 0.5}


def test_exact_accuracy_only_strips_on_the_left():
    assert metrics.accuracy(["dog"], [" dog"], exact=True).value == 1.0
    assert metrics.accuracy(["dog"], ["Dog"], exact=True).value == 0.0
    assert metrics.accuracy(["dog"], ["dog "], exact=True).value == 0.0


def test_choices_and_training_majority_set_the_levels():
    score = metrics.accuracy(["a", "b"], ["a", "a"], choices=[["a", "b"], ["a", "b", "c", "d"]], majority=["b", "b"])
    assert score.extra == {"chance": pytest.approx(0.375), "majority": 0.5}


def test_all_right_still_has_an_interval():
    score = metrics.accuracy(["a"] * 20, ["a"] * 20)
    assert (score.value, score.high) == (1.0, 1.0)
    assert score.low == pytest.approx(0.025 ** (1 / 20))
    none = metrics.accuracy(["a"] * 20, ["b"] * 20)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 20))


def test_unseen_words_are_scored_apart():
    references = ["the zebra sleeps", "a giraffe eats a zebra"]
    hypotheses = ["the zebra sleeps", "giraffe eats a cow too"]
    unseen = [{"zebra"}, {"zebra", "giraffe"}]
    assert metrics.unseen_word_counts(references, hypotheses, "en", unseen) == ([0, 1], [1, 2])


def test_mode_confusion():
    question, answer = "what is the capital of france", "it is paris"
    assert metrics.confused("what is the capital of france", own=answer, other=question, language="en")
    assert not metrics.confused("it is paris", own=answer, other=question, language="en")
    assert not metrics.confused("", own=answer, other=question, language="en")


@pytest.mark.parametrize(
    ("hypothesis", "right"),
    [("a dog", True), ("It is a Dog barking", True), ("dog or cat", False), ("cat", False), ("", False), ("a", False)],
)
def test_string_match_of_mmau(hypothesis, right):
    assert (metrics.chosen_option(hypothesis, ["a dog", "a cat", "a bird"]) == "a dog") is right


def test_paired_difference_is_narrower_than_the_two_intervals():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 15, size=100)
    hard = rng.binomial(lengths, rng.uniform(0, 0.6, size=100))
    better = np.maximum(hard - rng.integers(0, 2, size=100), 0)
    first, second = (hard, lengths), (better, lengths)
    difference = bootstrap.paired_difference(first, second)
    apart = [bootstrap.ratio_score("wer", *run) for run in (first, second)]
    assert difference.value == pytest.approx(apart[1].value - apart[0].value)
    assert difference.high < 0
    assert difference.p_value == 0.0
    assert difference.high - difference.low < (apart[0].high - apart[0].low) / 2


def test_same_run_twice_has_no_difference():
    run = ([1, 2, 0], [4, 4, 4])
    assert bootstrap.paired_difference(run, run) == bootstrap.Difference(0.0, 0.0, 0.0, 1.0)


def test_paired_difference_refuses_unequal_runs():
    with pytest.raises(ValueError, match="3 and 2 utterances"):
        bootstrap.paired_difference(([1, 2, 0], [4, 4, 4]), ([1, 2], [4, 4]))
