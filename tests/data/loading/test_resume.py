"""A run that dies and comes back sees what the uninterrupted one saw: to the bit, on any ranks and workers."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import DataConfig, OnChangedData, Order
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.loading.indexed import PackLoader
from qwen2audio_train.data.order.state import DataStateError
from tests.data.corpora import equal, small_config, step_content, take_steps, two_sources

Tok = PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("corpus")
    return small_config(folder, two_sources(folder), packs_per_step=4)


def ranks(config: DataConfig, tokenizer: Tok, world: int, state: dict[str, Any] | None = None) -> list[PackLoader]:
    loaders = [build_batches(config, tokenizer, rank=r, world_size=world) for r in range(world)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
    return loaders


@pytest.fixture(scope="module")
def whole(config: DataConfig, tokenizer: Tok) -> list[Any]:
    """Two and a half epochs without an interruption."""
    return [step_content(step) for step in take_steps(ranks(config, tokenizer, 1), 18)]


@pytest.mark.parametrize(
    ("before", "after", "workers"), [(1, 1, 0), (1, 2, 1), (2, 1, 0), (2, 4, 0), (4, 3, 0), (4, 3, 1)]
)
def test_resumed_is_uninterrupted(
    config: DataConfig, tokenizer: Tok, whole: list[Any], before: int, after: int, workers: int
) -> None:
    """Interrupted at a random step, in any epoch; the first loader has run ahead of what is saved."""
    stop = random.Random(f"{before}{after}{workers}").randrange(1, 14)
    first = ranks(dataclasses.replace(config, num_workers=workers), tokenizer, before)
    assert [step_content(step) for step in take_steps(first, stop + 1)] == whole[: stop + 1]
    states = [loader.state_dict(stop) for loader in first]
    assert all(state == states[0] for state in states)
    resumed = ranks(dataclasses.replace(config, num_workers=1 - workers), tokenizer, after, states[0])
    assert [step_content(step) for step in take_steps(resumed, 4)] == whole[stop : stop + 4]


def test_same_world_resumes_batch_for_batch(config: DataConfig, tokenizer: Tok) -> None:
    """With the ranks unchanged even the dealing and the order within a step are the same."""
    config = dataclasses.replace(config, packs_per_forward=2, order=Order.short_first)
    whole = take_steps(ranks(config, tokenizer, 2), 9)
    first = ranks(config, tokenizer, 2)
    take_steps(first, 5)
    rest = take_steps(ranks(config, tokenizer, 2, first[0].state_dict()), 4)
    for a, b in zip(whole[5:], rest, strict=True):
        for x, y in zip(a, b, strict=True):
            assert all(equal(p, q) for p, q in zip(x, y, strict=True))


def test_split_within_the_step_may_change_too(config: DataConfig, tokenizer: Tok) -> None:
    whole = [step_content(step) for step in take_steps(ranks(config, tokenizer, 1), 6)]
    (first,) = ranks(dataclasses.replace(config, packs_per_forward=4), tokenizer, 1)
    take_steps([first], 3)
    rest = take_steps(ranks(config, tokenizer, 1, first.state_dict()), 3)
    assert [step_content(step) for step in rest] == whole[3:]


def test_the_epoch_ends_the_same(config: DataConfig, tokenizer: Tok) -> None:
    loader = build_batches(config, tokenizer, epochs=2)
    whole = list(loader)
    assert loader.steps_done == loader.num_steps(2)
    again = build_batches(config, tokenizer, epochs=2)
    stream = iter(again)
    for _ in range(4 * 3):
        next(stream)
    resumed = build_batches(config, tokenizer, epochs=2)
    resumed.load_state_dict(again.state_dict())
    rest = list(resumed)
    assert len(rest) == len(whole) - 12
    assert all(equal(a, b) for a, b in zip(rest, whole[12:], strict=True))
    for name, seen in loader.telemetry.state_dict().items():
        assert resumed.telemetry.state_dict()[name] == pytest.approx(seen)


def test_iterating_again_goes_on(config: DataConfig, tokenizer: Tok) -> None:
    (loader,) = ranks(config, tokenizer, 1)
    parts = [step_content(step) for _ in range(3) for step in take_steps([loader], 2)]
    assert parts == [step_content(step) for step in take_steps(ranks(config, tokenizer, 1), 6)]


def test_state_is_small(config: DataConfig, tokenizer: Tok) -> None:
    (loader,) = ranks(config, tokenizer, 1)
    take_steps([loader], 2)
    assert len(json.dumps(loader.state_dict())) < 600 + 250 * len(config.sources)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed: 1 when saved, 2 now"),
        ({"tokens_per_pack": 130}, "tokens_per_pack: 120 when saved, 130 now"),
        ({"packs_per_step": 8}, "packs_per_step: 4 when saved, 8 now"),
        ({"order": Order.short_first}, "order: 'shuffled' when saved, 'short_first' now"),
        ({"prompt_seed": 1}, "sources.a.index"),
    ],
)
def test_a_changed_input_is_refused_by_name(
    config: DataConfig, tokenizer: Tok, change: dict[str, Any], named: str
) -> None:
    (loader,) = ranks(config, tokenizer, 1)
    state = loader.state_dict()
    with pytest.raises(DataStateError) as info:
        ranks(dataclasses.replace(config, **change), tokenizer, 1, state)
    assert named in str(info.value)


def test_a_changed_manifest_is_refused(tmp_path: Path, tokenizer: Tok) -> None:
    config = small_config(tmp_path, two_sources(tmp_path, 12, 8))
    (loader,) = ranks(config, tokenizer, 1)
    state = loader.state_dict()
    manifest = Path(config.sources["b"].path[0])
    manifest.write_text(manifest.read_text().replace("hello 3", "hello 4"))
    with pytest.raises(DataStateError, match=r"sources\.b\.content") as info:
        ranks(config, tokenizer, 1, state)
    assert "sources.a" not in str(info.value)


def test_moved_data_resume(tmp_path: Path, tokenizer: Tok) -> None:
    """The same manifests in another place are the same data."""
    (tmp_path / "old").mkdir()
    sources = two_sources(tmp_path / "old", 12, 8)
    config = small_config(tmp_path, sources)
    whole = [step_content(step) for step in take_steps(ranks(config, tokenizer, 1), 4)]
    (first,) = ranks(config, tokenizer, 1)
    take_steps([first], 2)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = {n: dataclasses.replace(s, path=[s.path[0].replace("/old/", "/new/")]) for n, s in sources.items()}
    config = dataclasses.replace(config, sources=moved, cache_dir=str(tmp_path / "another"))
    rest = take_steps(ranks(config, tokenizer, 1, first.state_dict()), 2)
    assert [step_content(step) for step in rest] == whole[2:]


def test_unknown_step_has_no_state(config: DataConfig, tokenizer: Tok) -> None:
    (loader,) = ranks(config, tokenizer, 1)
    take_steps([loader], 2)
    with pytest.raises(KeyError, match="no state for step 3"):
        loader.state_dict(3)


def drawn(loader: PackLoader, num_steps: int) -> list[tuple[int, int, int]]:
    """(source, pass, example) of everything in the next steps, from the requests that the workers get."""
    requests = islice(loader._requests(), num_steps * loader.batches_per_step)
    rows = [row for request in requests for row in request.tolist()]
    return sorted(map(tuple, rows))


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_per_pack": 200},
        {"packs_per_step": 7},
        {"window_examples": 20},
        {"samples_per_pack": 3},
        {"temperature": 3.0},
    ],
)
@pytest.mark.parametrize("twice", [False, True])
def test_going_on_after_a_change_completes_every_pass(
    config: DataConfig, tokenizer: Tok, change: dict[str, Any], twice: bool
) -> None:
    """Whatever the change of the plan, no example of a pass is lost or comes twice; nor after another interruption."""
    (first,) = ranks(config, tokenizer, 1)
    before = drawn(first, 5)
    take_steps([first], 5)
    state = first.state_dict()
    config = dataclasses.replace(config, on_changed_data=OnChangedData.go_on, **change)
    (loader,) = ranks(config, tokenizer, 1, state)
    after: list[tuple[int, int, int]] = []
    if twice:
        after = drawn(loader, 1)
        take_steps([loader], 1)
        assert loader.steps_done == 6
        (loader,) = ranks(config, tokenizer, 1, loader.state_dict())
    after += drawn(loader, 25)
    counts = Counter(before + after)
    assert max(counts.values()) == 1
    for source, size in ((0, 60), (1, 25)):
        assert {e for s, p, e in counts if s == source and p == 0} == set(range(size))


def test_going_on_with_more_data_keeps_the_unchanged_source(tmp_path: Path, tokenizer: Tok) -> None:
    sources = two_sources(tmp_path, 40, 10)
    config = small_config(tmp_path, sources)
    (first,) = ranks(config, tokenizer, 1)
    before = drawn(first, 3)
    take_steps([first], 3)
    sources["c"] = two_sources(tmp_path / "more", 30, 3)["a"]
    sources["a"].path += sources["c"].path
    config = dataclasses.replace(config, on_changed_data=OnChangedData.go_on)
    (loader,) = ranks(config, tokenizer, 1, first.state_dict())
    assert loader.source_names == ("a", "b", "c")
    after = drawn(loader, 40)
    of_b = Counter(row for row in before + after if row[0] == 1)
    assert {e for _, p, e in of_b if p == 0} == set(range(10))
    assert sum(of_b.values()) - len(of_b) <= config.window_examples  # at most the started window comes once more
    assert {e for s, p, e in after if s == 0 and p == 0} == set(range(70))


def test_another_seed_is_always_refused(config: DataConfig, tokenizer: Tok) -> None:
    (first,) = ranks(config, tokenizer, 1)
    config = dataclasses.replace(config, on_changed_data=OnChangedData.go_on, seed=5)
    with pytest.raises(DataStateError, match="seed: 1 when saved, 5 now"):
        ranks(config, tokenizer, 1, first.state_dict())
