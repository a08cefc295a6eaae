"""Metrics of answers of several parts, each against values worked out by hand."""

from __future__ import annotations

import pytest

from qwen2audio_train.evaluation.scoring.items import Item, Seen
from qwen2audio_train.evaluation.scoring.score import score_texts
from qwen2audio_train.evaluation.scoring.spans import (
    diarization_counts,
    event_counts,
    iou_counts,
    slot_counts,
)

TURNS = "<0.00>speaker 1<2.00> <2.00>speaker 2<4.00>"


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ("time: Seven in the morning; day: tomorrow", (4, 4)),
        ("day: tomorrow; time: seven in the morning.", (4, 4)),
        ("day: tomorrow", (2, 3)),
        ("day: tomorrow; day: tomorrow", (2, 4)),  # one of the two is one too many
        ("date: tomorrow; time: seven", (0, 4)),
        ("", (0, 2)),
    ],
)
def test_slots(said: str, counts: tuple[int, int]) -> None:
    assert slot_counts("time: seven in the morning; day: tomorrow", said, "en") == counts


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        (TURNS, (0, 4000)),
        ("<0.00>b<2.00> <2.00>a<4.00>", (0, 4000)),  # names are of no account
        ("<0.00>a<4.00>", (2000, 4000)),  # one speaker for two: the other's 2 s are wrong
        ("<0.00>a<1.50> <2.00>b<4.00>", (500, 4000)),  # missed
        ("<0.00>a<2.00> <2.00>b<4.50>", (500, 4000)),  # false alarm
        ("<0.00>a<2.50> <2.50>b<4.00>", (500, 4000)),  # wrong speaker
        ("<0.00>a<3.00> <1.00>b<4.00>", (2000, 4000)),  # 1 s too much of each
        ("<0.00>a<1.00> <1.00>b<2.00> <2.00>c<4.00>", (1000, 4000)),  # b is left without a partner
        ("nobody", (4000, 4000)),
    ],
)
def test_diarisation(said: str, counts: tuple[int, int]) -> None:
    assert diarization_counts(TURNS, said) == counts


def test_overlapping_speech_counts_for_each_speaker() -> None:
    both = "<0.00>a<2.00> <1.00>b<3.00>"
    assert diarization_counts(both, both) == (0, 4000)
    assert diarization_counts(both, "<0.00>x<3.00>") == (2000, 4000)


def test_the_best_mapping_is_not_the_greedy_one() -> None:
    """Greedy takes the pair (a, x) of 3 s and leaves 0 s; (a, y) and (b, x) have 2 s each."""
    reference = "<0.00>a<5.00> <5.00>b<7.00>"
    said = "<0.00>x<3.00> <3.00>y<5.00> <5.00>x<7.00>"
    assert diarization_counts(reference, said) == (3000, 7000)


@pytest.mark.parametrize(
    ("said", "counts"),
    [
        ("<0.50>dog bark<1.20> <3.00>rain<9.50>", (4, 4)),
        ("<0.70>dog bark<1.55> <3.20>rain<6.25>", (4, 4)),  # the collar; half of 0.7 s, half of 6.5 s
        ("<0.71>dog bark<1.20> <3.00>rain<6.24>", (0, 4)),
        ("<0.50>cat<1.20> <3.00>rain<9.50>", (2, 4)),
        ("<0.50>dog bark<1.20> <0.50>dog bark<1.20>", (2, 4)),
        ("none", (0, 2)),
    ],
)
def test_events(said: str, counts: tuple[int, int]) -> None:
    assert event_counts("<0.50>dog bark<1.20> <3.00>rain<9.50>", said) == counts


def test_as_many_events_as_can_be_are_matched() -> None:
    """The first fits both of the answer's, the second the earlier one alone."""
    assert event_counts("<1.00>a<2.00> <0.85>a<2.00>", "<0.80>a<2.00> <1.10>a<2.00>") == (4, 4)


@pytest.mark.parametrize(
    ("said", "permille"),
    [("<3.00>rain<9.00>", 1000), ("<3.00>it<6.00>", 500), ("<0.00>x<6.00>", 333), ("<3.00>a<5.00> <4.00>b<6.00>", 500),
     ("<9.00>x<10.00>", 0), ("", 0)],
)  # fmt: skip
def test_overlap_of_spans(said: str, permille: int) -> None:
    assert iou_counts("<3.00>rain<9.00>", said) == (permille, 1000)


def test_the_scores_of_a_set_are_their_sums() -> None:
    first = Item("1", "talks", "sd", None, None, None, TURNS, "diarization_error_rate")
    second = Item("2", "talks", "sd", None, None, None, "<0.00>speaker 1<1.00>", "diarization_error_rate")
    (row,) = score_texts([(first, "<0.00>a<4.00>"), (second, "<0.00>a<1.00>")], Seen(), bootstrap_samples=20)
    assert (row.score.metric, row.score.value) == ("diarization_error_rate", 0.4)
    assert 0.0 <= row.score.low <= 0.4 <= row.score.high <= 0.5
