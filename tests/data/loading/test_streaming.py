"""Sources without an index: the steps are the same on any number of ranks and workers, and resume exactly."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Audio, Dataset, Features, Value
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import DataConfig, SourceConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.loading import streaming
from qwen2audio_train.data.loading.base import Made
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.loading.logical_stream import LogicalStream, Raw, StreamCursor, StreamSource
from qwen2audio_train.data.loading.streaming import StreamDataset, StreamLoader, merge_states
from qwen2audio_train.data.order.index import Measured
from qwen2audio_train.data.order.state import DataStateError
from qwen2audio_train.data.quarantine import BadExample
from tests.data.corpora import is_filler, small_config, step_content, take_steps, write_corpus

Tok = PreTrainedTokenizerFast
CONSTANTS = {"task": "asr", "language": "en"}


def tars(folder: Path, name: str, num: int, num_shards: int, weight: float) -> SourceConfig:
    """A WebDataset of tones in equal shards."""
    rng = np.random.default_rng(len(name))
    write_corpus(folder, name, rng.uniform(0.1, 0.5, num).round(3).tolist())
    for shard in range(num_shards):
        with tarfile.open(folder / f"{name}-{shard:02d}.tar", "w") as archive:
            for i in range(shard, num, num_shards):
                for suffix, data in (
                    (".wav", (folder / name / f"{i}.wav").read_bytes()),
                    (".txt", f"hello {i}".encode()),
                ):
                    info = tarfile.TarInfo(f"{name}/{i}{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return SourceConfig([str(folder / f"{name}-*.tar")], weight=weight, constants=CONSTANTS, streaming=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two streamed sources, one with more and one with fewer shards than the step has slots."""
    folder = tmp_path_factory.mktemp("streams")
    sources = {"a": tars(folder, "a", 60, 12, 2.0), "b": tars(folder, "b", 40, 2, 1.0)}
    return small_config(folder, sources, packs_per_step=4, window_examples=80, max_bad_examples=0)


def ranks(config: DataConfig, tokenizer: Tok, world: int, state: dict[str, Any] | None = None) -> list[StreamLoader]:
    loaders = [build_batches(config, tokenizer, rank=r, world_size=world) for r in range(world)]
    for loader in loaders:
        assert isinstance(loader, StreamLoader)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
    return loaders  # type: ignore[return-value]


@pytest.fixture(scope="module")
def whole(config: DataConfig, tokenizer: Tok) -> list[Any]:
    return [step_content(step) for step in take_steps(ranks(config, tokenizer, 1), 14)]


@pytest.mark.parametrize(
    ("before", "after", "workers"), [(1, 1, 0), (1, 2, 2), (2, 1, 1), (2, 4, 0), (4, 3, 0), (3, 1, 2)]
)
def test_resumed_is_uninterrupted(
    config: DataConfig, tokenizer: Tok, whole: list[Any], before: int, after: int, workers: int
) -> None:
    first = ranks(dataclasses.replace(config, num_workers=workers), tokenizer, before)
    assert [step_content(step) for step in take_steps(first, 8)] == whole[:8]
    for stop in (3, 7):
        state = merge_states([loader.state_dict(stop) for loader in first])
        resumed = ranks(dataclasses.replace(config, num_workers=2 - workers), tokenizer, after, state)
        assert [step_content(step) for step in take_steps(resumed, 4)] == whole[stop : stop + 4]


def test_split_within_the_step_may_change_too(config: DataConfig, tokenizer: Tok, whole: list[Any]) -> None:
    (first,) = ranks(dataclasses.replace(config, packs_per_forward=4), tokenizer, 1)
    take_steps([first], 3)
    rest = take_steps(ranks(config, tokenizer, 1, first.state_dict()), 3)
    assert [step_content(step) for step in rest] == whole[3:6]


def test_steps_are_whole_and_fillers_make_up(config: DataConfig, tokenizer: Tok) -> None:
    loaders = ranks(config, tokenizer, 3)
    assert [loader.batches_per_step for loader in loaders] == [2, 2, 2]
    for step in take_steps(loaders, 5):
        assert [sum(map(is_filler, batches)) for batches in step] == [0, 1, 1]


def test_merged_slots_hold_the_same_targets(config: DataConfig, tokenizer: Tok) -> None:
    one, two = (take_steps(ranks(dataclasses.replace(config, packs_per_forward=n), tokenizer, 1), 4) for n in (1, 4))
    for (a,), (b,) in zip(one, two, strict=True):
        assert len(b) == 1
        assert sorted(t for batch in a for t in batch["target"].tolist()) == sorted(b[0]["target"].tolist())


def test_weights_and_telemetry(config: DataConfig, tokenizer: Tok) -> None:
    (loader,) = ranks(config, tokenizer, 1)
    take_steps([loader], 30)
    log = loader.telemetry.take()
    assert log["a/share"] == pytest.approx(2 / 3, abs=0.03)
    assert log["a/pass"] > 1
    assert log["a/hours"] == pytest.approx(log["a/examples"] * 0.3 / 3600, rel=0.15)
    assert 0.8 < log["fill"] <= 1
    assert 0 < log["decode_s"] < log["materialise_s"]
    assert log["a/quarantined"] == log["b/quarantined"] == 0


def test_states_of_other_data_and_of_some_ranks_are_refused(config: DataConfig, tokenizer: Tok) -> None:
    first = ranks(config, tokenizer, 2)
    take_steps(first, 1)
    with pytest.raises(DataStateError, match=r"lacks the streams \[1, 3\]"):
        ranks(config, tokenizer, 1, first[0].state_dict())
    state = merge_states([loader.state_dict() for loader in first])
    assert len(json.dumps(state)) < 2000
    with pytest.raises(DataStateError, match="seed: 1 when saved, 3 now"):
        ranks(dataclasses.replace(config, seed=3), tokenizer, 1, state)
    fewer = dataclasses.replace(config.sources["a"], path=[config.sources["a"].path[0].replace("*", "0*")])
    with pytest.raises(DataStateError, match=r"sources\.a\.shards"):
        ranks(dataclasses.replace(config, sources=config.sources | {"a": fewer}), tokenizer, 1, state)


def test_what_needs_an_index_is_refused(config: DataConfig, tokenizer: Tok) -> None:
    a = config.sources["a"]
    for change, message in (
        ({"sources": config.sources | {"b": dataclasses.replace(a, streaming=False)}}, "do not mix"),
        ({"sources": {"a": dataclasses.replace(a, epochs=2.0)}}, "epochs and max_examples need an index"),
        ({"loss_weighting": "task"}, "data.loss_weighting=task"),
        ({"order": "short_first"}, "data.order=short_first"),
    ):
        kwargs: dict[str, Any] = dict(change)
        if "loss_weighting" in kwargs:
            kwargs["loss_weighting"] = type(config.loss_weighting)(kwargs["loss_weighting"])
        if "order" in kwargs:
            kwargs["order"] = type(config.order)(kwargs["order"])
        with pytest.raises(ConfigError, match=message):
            build_batches(dataclasses.replace(config, **kwargs), tokenizer)


def test_a_shard_that_vanishes_costs_itself(tmp_path: Path, tokenizer: Tok) -> None:
    source = tars(tmp_path, "a", 40, 8, 1.0)
    config = small_config(tmp_path, {"a": source}, packs_per_step=2, window_examples=20, max_bad_share=1.0)
    loader = build_batches(config, tokenizer, bad_examples_path=tmp_path / "bad.jsonl")
    stream = iter(loader)
    next(stream)
    (tmp_path / "a-05.tar").unlink()
    whole = (tmp_path / "a-06.tar").read_bytes()
    (tmp_path / "a-06.tar").write_bytes(whole[:5000])
    for _ in range(40):
        next(stream)
    entries = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    reasons = {Path(entry["example"].split(":")[0]).name: entry["reason"] for entry in entries}
    assert "a-05.tar" in reasons
    assert "cut off" in reasons["a-06.tar"]


def test_parquet_is_streamed(tmp_path: Path, tokenizer: Tok, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    write_corpus(tmp_path, "a", [0.1 + 0.01 * i for i in range(24)])
    features = Features({"id": Value("string"), "audio": Audio(decode=False), "text": Value("string")})
    (tmp_path / "pq").mkdir()
    for shard in range(3):
        numbers = range(8 * shard, 8 * shard + 8)
        rows = {
            "id": [f"p{i}" for i in numbers],
            "audio": [{"bytes": (tmp_path / "a" / f"{i}.wav").read_bytes(), "path": None} for i in numbers],
            "text": [f"hello {i}" for i in numbers],
        }
        table = Dataset(pa.Table.from_pydict(rows, schema=features.arrow_schema))
        table.to_parquet(tmp_path / "pq" / f"train-{shard:05d}-of-00003.parquet")
    source = SourceConfig(
        [str(tmp_path / "pq")], split="train", columns={"id": "id"}, constants=CONSTANTS, streaming=True
    )
    config = small_config(tmp_path, {"s": source}, packs_per_step=2, window_examples=24, max_bad_examples=0)
    whole = [step_content(step) for step in take_steps(ranks(config, tokenizer, 1), 6)]
    first = ranks(config, tokenizer, 2)
    take_steps(first, 3)
    rest = ranks(config, tokenizer, 1, merge_states([loader.state_dict() for loader in first]))
    assert [step_content(step) for step in take_steps(rest, 3)] == whole[3:]
    assert sum(loader.telemetry.examples.sum() for loader in first) > 20


# One stream by itself, over shards that are lists


def listed(name: str, sizes: list[int], chance: float = 1.0) -> StreamSource:
    from qwen2audio_train.data.examples import ChatExample

    def read(shard: int) -> Any:
        for i in range(sizes[shard]):
            if i % 10 == 7:
                yield BadExample(f"{shard}/{i}", "Bad", "")
            else:
                yield Raw(ChatExample(f"{name}/{shard}/{i}", (), name))

    return StreamSource(name, chance, len(sizes), read)


def streams(num: int, *sources: StreamSource, window: int = 16) -> list[LogicalStream]:
    def measure(raw: Raw) -> Measured:
        return Measured(1.0, 10, 5 + len(raw.example.id), "chat")

    return [LogicalStream(j, num, sources, measure, 3, 100, 100, window) for j in range(num)]


@pytest.mark.parametrize(("num_streams", "sizes"), [(3, [20] * 7), (4, [50, 30]), (8, [65]), (2, [0, 40, 0, 13])])
def test_a_pass_over_all_streams_is_every_row_once(num_streams: int, sizes: list[int]) -> None:
    rows: Counter[str] = Counter()
    bad = 0
    for stream in streams(num_streams, listed("s", sizes), window=1):
        for pack in stream.packs(stream.start()):
            if pack.after.places[0].number > 0:
                break
            rows.update(item.raw.example.id for item in pack.drawn)
            bad += len(pack.bad)
    expected = [f"s/{shard}/{i}" for shard, size in enumerate(sizes) for i in range(size) if i % 10 != 7]
    assert rows == Counter(expected)
    assert bad == sum(sizes) - len(expected)


def test_a_stream_goes_on_from_any_cursor() -> None:
    (stream, _) = streams(2, listed("s", [30, 50, 20], 0.7), listed("t", [40], 0.3))
    whole = list(itertools.islice(stream.packs(stream.start()), 60))
    for stop in range(0, 50, 7):
        cursor = StreamCursor.from_json(json.loads(json.dumps(whole[stop].after.to_json())))
        rest = list(itertools.islice(stream.packs(cursor), 8))
        assert rest == whole[stop + 1 : stop + 9]


def test_an_empty_source_is_told() -> None:
    (stream,) = streams(1, listed("s", [0, 0]))
    with pytest.raises(ValueError, match="s: 16 passes over shards of stream 0 gave no example"):
        next(stream.packs(stream.start()))


@pytest.mark.parametrize(
    ("places", "wanted", "started"), [(1, 8, 8), (2, 8, 8), (3, 8, 6), (11, 8, 8), (7, 3, 3), (4, 4, 4), (5, 0, 0)]
)
def test_every_number_of_workers_hands_out_the_same_batches(
    places: int, wanted: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers played in turn, as the DataLoader asks them."""
    batches = [[stream] for stream in streams(places, listed("s", [30, 50, 20], 0.7), listed("t", [40], 0.3))]
    dataset = StreamDataset(batches, lambda raw, *_: raw.example.id, list)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(Made, "of", classmethod(lambda cls, making, **more: more["cursors"]))
    whole = list(itertools.islice(dataset, 6 * places))
    assert dataset.workers(wanted) == started

    def played(number: int) -> Any:
        monkeypatch.setattr(
            streaming, "get_worker_info", lambda: SimpleNamespace(id=number, num_workers=started) if started else None
        )
        made = iter(dataset)
        return itertools.chain([next(made)], made)

    workers = [played(number) for number in range(max(started, 1))]
    made = (next(workers[turn]) for turn in itertools.cycle(range(len(workers))))
    assert list(itertools.islice((item for item in made if item is not None), 6 * places)) == whole
