"""From the data part of a recipe to the loader over streaming sources."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from qwen2audio_train.config.data import DataConfig, LossWeighting, Order
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import task_of
from qwen2audio_train.data.loading.base import are_preferences
from qwen2audio_train.data.loading.logical_stream import LogicalStream, Raw, StreamSource
from qwen2audio_train.data.loading.streaming import StreamLoader
from qwen2audio_train.data.manifests.corpus import Contents, Corpus, check_first_columns, open_corpus
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.manifest import parse_record
from qwen2audio_train.data.manifests.tables import Row
from qwen2audio_train.data.order.index import Measured
from qwen2audio_train.data.order.mixture import weighting_of
from qwen2audio_train.data.order.planner import plan_inputs
from qwen2audio_train.data.quarantine import BadExample, Quarantine, costing_one_example
from qwen2audio_train.data.samples.maker import Maker, collator_of
from qwen2audio_train.data.samples.recipe import remote_of
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.data.storage.files import text_hash
from qwen2audio_train.errors import ExampleError

SMALLEST_WINDOW = 64
"""Examples that a logical stream fills packs from, at the least: fewer leave packs empty (best fit fills 63 % of 4 096
tokens from 16 examples with a median of 250, 89 % from 64, 97 % from 256), more are held in memory."""


def build_streams(data: DataConfig, maker: Maker, quarantine: Quarantine, rank: int, world_size: int) -> StreamLoader:
    """The loader of one rank. Raises ConfigError for what needs an index."""
    _check(data)
    readers = _open_readers(data, maker)
    num_shards = {name: reader.corpus.num_shards for name, reader in readers.items()}
    chances = weighting_of(data, num_shards).probabilities(data.temperature)
    sources = tuple(StreamSource(name, chances[name], num_shards[name], r.read) for name, r in readers.items())
    tasks = {source.name: _first_task(source) for source in sources}
    return StreamLoader(
        _logical_streams(data, maker, sources),
        partial(_make, maker),
        collator_of(data, maker, are_preferences(tasks)),
        _inputs(data, maker, readers, sources),
        tasks,
        quarantine,
        rank=rank,
        world_size=world_size,
        packs_per_forward=data.packs_per_forward,
        num_workers=data.num_workers,
        prefetch_factor=data.prefetch_factor,
    )


def _open_readers(data: DataConfig, maker: Maker) -> dict[str, ShardReader]:
    """The sources in the order of their names. Raises ConfigError for a column that a source does not have."""
    readers: dict[str, ShardReader] = {}
    for name, source in sorted(data.sources.items()):
        corpus = open_corpus(name, source, remote_of(maker.recipe))
        check_first_columns(corpus, source.columns, f"data.sources.{name}")
        readers[name] = ShardReader(corpus)
    return readers


def _logical_streams(data: DataConfig, maker: Maker, sources: tuple[StreamSource, ...]) -> tuple[LogicalStream, ...]:
    """A stream for every pack of a step, whatever the number of ranks: that is what lets another number resume."""
    limit = min(data.max_tokens_per_example or data.tokens_per_pack, data.tokens_per_pack)
    window = max(SMALLEST_WINDOW, data.window_examples // data.packs_per_step)
    return tuple(
        LogicalStream(
            number,
            data.packs_per_step,
            sources,
            partial(_measure, maker),
            data.seed,
            data.tokens_per_pack,
            limit,
            window,
            data.samples_per_pack,
        )
        for number in range(data.packs_per_step)
    )


def _inputs(
    data: DataConfig, maker: Maker, readers: Mapping[str, ShardReader], sources: Sequence[StreamSource]
) -> dict[str, Any]:
    """What the order of the examples depends on; a state saved with other inputs does not resume in silence."""
    shared = plan_inputs(
        data.seed, data.tokens_per_pack, data.samples_per_pack, data.max_tokens_per_example, data.window_examples
    )
    return {
        **shared,
        "packs_per_step": data.packs_per_step,
        "measured": text_hash(maker.measure_key),
        "sources": {
            source.name: {
                "shards": readers[source.name].fingerprint,
                "number": source.num_shards,
                "probability": source.probability,
            }
            for source in sources
        },
    }


def _check(data: DataConfig) -> None:
    if data.loss_weighting is LossWeighting.task:
        raise ConfigError("data.loss_weighting=task: streams do not know their tasks; index the sources, or use sample")
    if data.order is not Order.shuffled:
        raise ConfigError(f"data.order={data.order}: streams know no lengths; index the sources, or use shuffled")
    for name, source in data.sources.items():
        if source.epochs is not None or source.max_examples is not None:
            raise ConfigError(f"data.sources.{name}: epochs and max_examples need an index; leave streaming unset")


@dataclass(frozen=True)
class ShardReader:
    """Examples of a corpus, shard by shard."""

    corpus: Corpus

    @property
    def fingerprint(self) -> str:
        """Names of the shards, sizes of the local ones, and what becomes of their rows."""
        sizes = [os.path.getsize(f) if os.path.isfile(f) else -1 for f in self.corpus.files]
        mapping = [sorted(self.corpus.columns.items()), sorted(self.corpus.constants.items())]
        return text_hash(str([os.path.basename(f) for f in self.corpus.files]), str(sizes), str(mapping))

    def read(self, shard: int) -> Iterator[Raw | BadExample]:
        """The examples of a shard; what cannot be read comes as a bad one in its place."""
        place = self.corpus.place(shard)
        bad: list[BadExample] = []  # a shard that vanishes or breaks off costs the rest of itself
        with costing_one_example(bad, f"{place}:1", self.corpus.name) as suspect:
            for number, row, contents in self.corpus.rows_with_bytes(shard):
                suspect.example = f"{place}:{number}"
                yield self._example(row, contents, place, number)
                suspect.example = f"{place}:{number + 1}"
        yield from bad

    def _example(self, row: Row | ManifestError, contents: Contents, place: str, number: int) -> Raw | BadExample:
        try:
            if isinstance(row, ManifestError):
                raise row
            return Raw(parse_record(self.corpus.record(row, place, number), place, number), contents)
        except (ExampleError, AttributeError, KeyError, TypeError) as error:  # a row that holds no plain values
            return BadExample.of(error, f"{place}:{number}", line=number)


def _measure(maker: Maker, raw: Raw) -> Measured:
    return maker.measure(raw.example, raw.contents)


def _make(maker: Maker, raw: Raw, source: int, number: int) -> Sample:
    return maker.make(raw.example, source, number, raw.contents)


def _first_task(source: StreamSource) -> tuple[str, ...]:
    """The task of the first good example of the first shard, none if it has none."""
    first = next((row.example for row in source.read(0) if isinstance(row, Raw)), None)
    return () if first is None else (task_of(first),)
