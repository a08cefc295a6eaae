"""Sources that are read front to back, without an index: logical streams, one for every slot of a step.

Slot j of every step is fed by stream j, whichever rank it falls to: so any number of ranks sees the same steps. A
stream draws from the sources by their weights; of each source it reads its own share of the shards (every shard in its
place in a shuffled order, split between streams where there are fewer shards than streams), pass after pass. It looks
ahead over a window of examples, measures them by their headers, and packs them by best fit within the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.order.index import Measured
from qwen2audio_train.data.order.mixture import PositionTree, apportion
from qwen2audio_train.data.order.permutation import hash_key, permute
from qwen2audio_train.data.order.planner import best_fit, cost_of, equal_groups
from qwen2audio_train.data.quarantine import BadExample, costing_one_example
from qwen2audio_train.errors import UserError

MOST_EMPTY_PASSES = 16
"""Passes in a row over nothing but empty shards after which a source counts as empty."""

BLOCK = 1024
"""Draws over which the weights of the sources come out exactly."""


@dataclass(frozen=True)
class Raw:
    """An example as a reader hands it over, with the bytes of its clips where they are at hand."""

    example: Example
    contents: tuple[bytes | None, ...] | None = None


@dataclass(frozen=True)
class StreamSource:
    """A source of `num_shards` shards; `read(shard)` goes through one from its start, always in the same order."""

    name: str
    probability: float
    num_shards: int
    read: Callable[[int], Iterator[Raw | BadExample]]


@dataclass(frozen=True)
class Place:
    """Position in a source: pass number, parts already read in this pass, rows already read of the next part."""

    number: int = 0
    part: int = 0
    taken: int = 0


@dataclass(frozen=True)
class StreamCursor:
    """The next pack of a stream: draws and places at the start of its window, and the packs given from it."""

    places: tuple[Place, ...]
    position: int = 0
    slot: int = 0

    def to_json(self) -> list[Any]:
        return [self.position, self.slot, *([p.number, p.part, p.taken] for p in self.places)]

    @staticmethod
    def from_json(values: Sequence[Any]) -> StreamCursor:
        position, slot, *places = values
        return StreamCursor(tuple(Place(*place) for place in places), position, slot)


@dataclass(frozen=True)
class Drawn:
    """An example of a window: its source's number, its pass, what it is and what it measures."""

    source: int
    number: int
    raw: Raw
    measured: Measured

    @property
    def tokens(self) -> int:
        return self.measured.audio_tokens + self.measured.text_tokens


@dataclass(frozen=True)
class StreamPack:
    """A pack of a stream, the cursor after it, and what was left out on the way to it."""

    drawn: tuple[Drawn, ...]
    after: StreamCursor
    bad: tuple[BadExample, ...] = ()
    too_long: tuple[Drawn, ...] = ()


@dataclass(frozen=True)
class LogicalStream:
    """Stream `number` of `num_streams`; `window_examples` are those of one stream."""

    number: int
    num_streams: int
    sources: tuple[StreamSource, ...]
    measure: Callable[[Raw], Measured]
    seed: int
    tokens_per_pack: int
    token_limit: int
    window_examples: int
    samples_per_pack: int | None = None
    schedule: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = apportion([source.probability for source in self.sources], BLOCK)
        schedule, draws = np.empty(BLOCK, dtype=np.int64), np.empty(BLOCK, dtype=np.int64)
        tree = PositionTree(hash_key(self.seed, "stream", self.number), 0, counts)
        tree.place(np.arange(BLOCK), np.arange(BLOCK), schedule, draws, 0, len(counts))
        object.__setattr__(self, "schedule", schedule)

    def start(self) -> StreamCursor:
        return StreamCursor(tuple(Place() for _ in self.sources))

    def packs(self, cursor: StreamCursor) -> Iterator[StreamPack]:
        """Packs from `cursor` on, without end. Reading starts anew at the window that the cursor points into."""
        readers = [self._rows(source, place) for source, place in zip(self.sources, cursor.places, strict=True)]
        given = cursor.slot
        while True:
            drawn, bad, after = self._window(readers, cursor)
            fitting = [item for item in drawn if item.tokens <= self.token_limit]
            too_long = tuple(item for item in drawn if item.tokens > self.token_limit)
            groups = self._groups(fitting, cursor.position)
            for place in range(given, len(groups)):
                last = place + 1 == len(groups)
                behind = after if last else replace(cursor, slot=place + 1)
                first = place == 0
                yield StreamPack(
                    tuple(fitting[i] for i in groups[place]), behind, bad if first else (), too_long if first else ()
                )
            cursor, given = after, 0

    def _window(
        self, readers: list[Iterator[tuple[Raw | BadExample, Place]]], cursor: StreamCursor
    ) -> tuple[list[Drawn], tuple[BadExample, ...], StreamCursor]:
        drawn: list[Drawn] = []
        bad: list[BadExample] = []
        places = list(cursor.places)
        for position in range(cursor.position, cursor.position + self.window_examples):
            source = int(self.schedule[position % BLOCK])
            raw, places[source] = next(readers[source])
            if isinstance(raw, BadExample):
                bad.append(replace(raw, source=self.sources[source].name))
                continue
            with costing_one_example(bad, raw.example.id, self.sources[source].name):
                drawn.append(Drawn(source, places[source].number, raw, self.measure(raw)))
        return drawn, tuple(bad), StreamCursor(tuple(places), cursor.position + self.window_examples)

    def _groups(self, drawn: Sequence[Drawn], position: int) -> list[NDArray[np.int64]]:
        """Members of the packs, in shuffled order; one empty pack if nothing fits."""
        tokens = np.array([item.tokens for item in drawn], dtype=np.int64)
        if self.samples_per_pack is None:
            groups = best_fit(tokens, self.tokens_per_pack)
        else:
            audio = np.array([item.measured.audio_tokens for item in drawn], dtype=np.int64)
            groups = equal_groups(cost_of(tokens, audio), self.samples_per_pack)
        rng = np.random.default_rng(hash_key(self.seed, "window", self.number, position))
        return [groups[i] for i in rng.permutation(len(groups))] or [np.empty(0, dtype=np.int64)]

    def _rows(self, source: StreamSource, place: Place) -> Iterator[tuple[Raw | BadExample, Place]]:
        """This stream's rows of a source from `place` on, with the place after each, pass after pass."""
        split = -(-self.num_streams // source.num_shards)
        num_parts = source.num_shards * split
        empty_passes = 0
        while empty_passes < MOST_EMPTY_PASSES:
            empty_passes += 1
            order = permute(np.arange(num_parts), num_parts, hash_key(self.seed, "parts", source.name, place.number))
            mine = order[self.number :: self.num_streams].tolist()
            for part in range(place.part, len(mine)):
                shard, offset = divmod(mine[part], split)
                rows = islice(source.read(shard), offset + place.taken * split, None, split)
                for taken, row in enumerate(rows, start=place.taken + 1):
                    empty_passes = 0
                    yield row, Place(place.number, part, taken)
                place = Place(place.number, part + 1)
            place = Place(place.number + 1)
        raise UserError(f"{source.name}: {empty_passes} passes over shards of stream {self.number} gave no example")
