"""The order of examples: bijections, exact counts, even spread, caps, groups; the same wherever it is entered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2audio_train.config.data import GroupConfig, Order
from qwen2audio_train.data.order.mixture import MixedSource, Mixture, Weighting, apportion
from qwen2audio_train.data.order.permutation import permute, permute_in_groups


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_permute_is_the_same_one_at_a_time() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    assert [int(permute(np.array([i]), 1000, 7)[0]) for i in range(1000)] == whole.tolist()


def test_permute_looks_random() -> None:
    """Neighbours land apart: mean distance n/3, no fixed stride, and keys give unrelated orders."""
    n = 100_003
    first, second = permute(np.arange(n), n, 1), permute(np.arange(n), n, 2)
    assert abs(np.abs(np.diff(first)).mean() / n - 1 / 3) < 0.01
    assert abs(np.corrcoef(first, np.arange(n))[0, 1]) < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_permute_in_groups_is_a_bijection_that_stays_in_few_shards() -> None:
    counts = np.array([100, 0, 250, 30] * 10)
    shard_of = np.repeat(np.arange(40), counts)
    order = permute_in_groups(np.arange(counts.sum()), counts, 5)
    assert np.array_equal(np.sort(order), np.arange(counts.sum()))
    pieces = np.array_split(order, 20)
    assert max(len(set(shard_of[piece].tolist())) for piece in pieces) <= 16
    some = np.random.default_rng(0).permutation(counts.sum())[:50]
    assert np.array_equal(permute_in_groups(some, counts, 5), order[some])
    assert len(set(shard_of[order[:100]].tolist())) > 3
    assert not np.array_equal(permute_in_groups(np.arange(counts.sum()), counts, 6), order)


def mixture(
    *sizes: int, chances: list[float] | None = None, caps: list[float | None] | None = None, **kwargs: object
) -> Mixture:
    chances = chances or [size / sum(sizes) for size in sizes]
    sources = tuple(
        MixedSource(f"s{i}", size, chance, cap)
        for i, (size, chance, cap) in enumerate(zip(sizes, chances, caps or [None] * len(sizes), strict=True))
    )
    return Mixture(sources, seed=3, **kwargs)  # type: ignore[arg-type]


def test_unweighted_epoch_holds_every_example_once() -> None:
    mix = mixture(700, 1, 33, 266)
    orders = []
    for epoch in range(3):
        source, number, example = mix.locate(epoch, 0, mix.epoch_size(epoch))
        assert set(number.tolist()) == {epoch}
        pairs = list(zip(source.tolist(), example.tolist(), strict=True))
        assert sorted(pairs) == [(s, e) for s, size in enumerate((700, 1, 33, 266)) for e in range(size)]
        orders.append(pairs)
    assert orders[0] != orders[1] != orders[2]


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=7), st.data())
def test_any_slice_is_a_slice_of_the_whole(sizes: list[int], data: st.DataObject) -> None:
    mix = mixture(*sizes)
    size = mix.epoch_size(1)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole, part = mix.locate(1, 0, size), mix.locate(1, start, stop)
    for a, b in zip(whole, part, strict=True):
        assert np.array_equal(a[start:stop], b)


def test_weights_hold_in_every_stretch() -> None:
    """In any prefix the draws of a source differ from its share by at most the depth of the tree."""
    chances = [0.5, 0.3, 0.15, 0.05]
    mix = mixture(100, 100_000, 30_000, 50_000, chances=chances)
    source, _, _ = mix.locate(0, 0, mix.epoch_size(0))
    for s, chance in enumerate(chances):
        drift = np.cumsum(source == s) - chance * np.arange(1, len(source) + 1)
        assert np.abs(drift).max() <= 3


def test_a_source_is_used_up_before_it_comes_again() -> None:
    mix = mixture(50, 1000, chances=[0.5, 0.5])
    source, number, example = mix.locate(0, 0, mix.epoch_size(0))
    small = source == 0
    draws = list(zip(number[small].tolist(), example[small].tolist(), strict=True))
    assert [n for n, _ in draws] == [i // 50 for i in range(len(draws))]
    assert {e for n, e in draws if n == 0} == set(range(50))
    # and goes on in the next epoch where it stopped
    source, number, _ = mix.locate(1, 0, 100)
    assert number[source == 0][0] == len(draws) // 50


def test_cap_ends_a_source_and_the_others_keep_their_proportions() -> None:
    mix = mixture(100, 1000, 500, chances=[0.4, 0.4, 0.2], caps=[2.5, None, None])
    totals = np.sum([mix.counts(epoch) for epoch in range(20)], axis=0)
    assert totals[0] == 250
    assert mix.counts(0)[0] == 250  # 0.4 of 1600 is more than the cap
    assert mix.counts(1).tolist() == [0, 640, 320]


def test_all_capped_ends() -> None:
    mix = mixture(10, 20, caps=[1.0, 2.0])
    assert [mix.epoch_size(e) for e in range(4)] == [30, 20, 0, 0]


def test_short_first_once_then_shuffled() -> None:
    by_length = np.array([3, 1, 0, 2])
    mix = Mixture((MixedSource("s", 4, 1.0, None, by_length),), seed=1, order=Order.short_first)
    assert mix.locate(0, 0, 4)[2].tolist() == [3, 1, 0, 2]
    later = [tuple(mix.locate(epoch, 0, 4)[2].tolist()) for epoch in range(1, 20)]
    assert len(set(later)) > 5


def test_sequential_is_the_manifest() -> None:
    assert mixture(5, order=Order.sequential).locate(3, 0, 5)[2].tolist() == [0, 1, 2, 3, 4]


def test_a_hundred_million_examples_are_no_list() -> None:
    mix = mixture(90_000_000, 10_000_000)
    _, number, example = mix.locate(5, 60_000_000, 60_000_100)
    assert example.max() > 1_000_000
    assert set(number.tolist()) == {5}
    with pytest.raises(ValueError, match="between 1 and"):
        mixture(2**31)


def test_apportion() -> None:
    assert apportion([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert apportion([0.999, 0.001], 100).tolist() == [100, 0]


def weighting(**kwargs: object) -> Weighting:
    base = {
        "sizes": {"a": 100, "b": 300, "c": 600},
        "weights": dict.fromkeys("abc"),
        "group_of": dict.fromkeys("abc", ""),
    }
    return Weighting(**(base | {"groups": {}} | kwargs))  # type: ignore[arg-type]


def test_probabilities_by_size_and_temperature() -> None:
    assert weighting().probabilities() == pytest.approx({"a": 0.1, "b": 0.3, "c": 0.6})
    roots = np.sqrt([1, 3, 6])
    assert weighting().probabilities(2.0) == pytest.approx(dict(zip("abc", roots / roots.sum(), strict=True)))


def test_nested_groups_share_their_parents_probability() -> None:
    given = weighting(
        weights={"a": 1.0, "b": 3.0, "c": 2.0},
        group_of={"a": "speech/asr", "b": "speech/asr", "c": "sound"},
        groups={"speech": GroupConfig(weight=0.9), "sound": GroupConfig(weight=0.1)},
    )
    assert given.probabilities() == pytest.approx({"a": 0.225, "b": 0.675, "c": 0.1})
    flat = GroupConfig(temperature=1e9)
    given = weighting(group_of={"a": "speech", "b": "speech", "c": "sound"}, groups={"speech": flat})
    assert given.probabilities() == pytest.approx({"a": 0.2, "b": 0.2, "c": 0.6})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": {"a": 1.0, "b": None, "c": 1.0}}, "without one: b"),
        ({"weights": {"a": 1.0, "b": 0.0, "c": 1.0}}, "above 0"),
        ({"groups": {"speach": GroupConfig(weight=1.0)}}, "no source is in group speach"),
    ],
)
def test_impossible_weights_are_refused(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighting(**kwargs).probabilities()
