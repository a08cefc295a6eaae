"""The loader over logical streams: the same steps, batches and promises as `PackLoader`, without an index.

Reading and planning run in the workers, each of which has whole streams to itself; a batch comes back with the cursors
of its streams, and these are the state. So the state of a step is spread over the ranks until it is put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from qwen2audio_train.data.loading.base import BatchLoader, Made, Making, check_rank
from qwen2audio_train.data.loading.logical_stream import LogicalStream, Raw, StreamCursor, StreamPack
from qwen2audio_train.data.loading.telemetry import Telemetry
from qwen2audio_train.data.order.state import STATE_VERSION, DataStateError, changed_inputs, other_data, plan_hash
from qwen2audio_train.data.quarantine import Quarantine, costing_one_example
from qwen2audio_train.data.samples.collate import LoadedBatch
from qwen2audio_train.data.samples.sample import Sample

KEPT_STEPS = 100

MakeSample = Callable[[Raw, int, int], Sample]
"""(example, number of its source, pass over the source) -> Sample."""


@dataclass
class StreamMade(Made):
    """What comes beside a batch: also the cursors of its streams, and what it holds per source."""

    cursors: dict[int, StreamCursor] = field(default_factory=dict)
    drawn: list[tuple[int, int, float, int]] = field(default_factory=list)
    """(source, pass, seconds, tokens) of every example."""
    too_long: list[int] = field(default_factory=list)
    num_packs: int = 0


class StreamDataset(IterableDataset[tuple[LoadedBatch, StreamMade] | None]):
    """Batches of one rank, in the order of its places in a step, step after step.

    The workers are so many columns times so many turns. A column has every so-many-th place of a step, and its streams
    with it; with fewer places than workers, the workers of a column read the same streams and make the batches of
    every so-many-th step. So the order is that of one worker, whatever their number; where the places do not fill the
    columns, the last ones hand back None.
    """

    def __init__(
        self,
        streams: Sequence[Sequence[LogicalStream]],
        make_sample: MakeSample,
        collate: Callable[[list[Sample]], LoadedBatch],
    ) -> None:
        """`streams[b]` feed batch b of every step; none at all make it a filler."""
        self.streams, self.make_sample, self.collate = streams, make_sample, collate
        self.cursors: dict[int, StreamCursor] = {}

    def workers(self, wanted: int) -> int:
        """How many workers share the work evenly, of so many at most: columns x turns."""
        return wanted if wanted <= len(self.streams) else wanted // len(self.streams) * len(self.streams)

    def __iter__(self) -> Iterator[tuple[LoadedBatch, StreamMade] | None]:
        worker = get_worker_info()
        number, total = (worker.id, worker.num_workers) if worker else (0, 1)
        columns = min(total, len(self.streams))
        turn, column = divmod(number, columns)
        mine = self.streams[column::columns]
        padding = math.ceil(len(self.streams) / columns) - len(mine)
        running = {s.number: s.packs(self.cursors.get(s.number, s.start())) for batch in mine for s in batch}
        for step in count():
            for batch in mine:
                packs = [(stream, next(running[stream.number])) for stream in batch]
                if step % (total // columns) == turn:
                    yield self._batch(packs)
            yield from [None] * padding

    def _batch(self, packs: list[tuple[LogicalStream, StreamPack]]) -> tuple[LoadedBatch, StreamMade]:
        making = Making()
        for stream, pack in packs:
            for item in pack.drawn:
                with costing_one_example(making.bad, item.raw.example.id, stream.sources[item.source].name):
                    making.samples.append(self.make_sample(item.raw, item.source, item.number))
            making.bad += pack.bad
        drawn = [item for _, pack in packs for item in pack.drawn]
        made: StreamMade = StreamMade.of(
            making,
            cursors={stream.number: pack.after for stream, pack in packs},
            drawn=[(item.source, item.number, item.measured.duration_s, item.tokens) for item in drawn],
            too_long=[item.source for _, pack in packs for item in pack.too_long],
            num_packs=sum(bool(pack.drawn) for _, pack in packs),
        )
        return self.collate(making.samples), made


@dataclass
class StreamLoader(BatchLoader[StreamMade]):
    """Batches of streaming sources, without end.

    Args:
        streams: all logical streams of a step, in order; slot j falls to rank j % world_size.
    """

    streams: tuple[LogicalStream, ...]
    make_sample: MakeSample
    collate: Callable[[list[Sample]], LoadedBatch]
    inputs: dict[str, Any]
    tasks: dict[str, tuple[str, ...]]
    quarantine: Quarantine
    rank: int = 0
    world_size: int = 1
    packs_per_forward: int = 1
    num_workers: int = 0
    prefetch_factor: int = 4

    def __post_init__(self) -> None:
        check_rank(self.rank, self.world_size)
        one = self.streams[0]
        budget = None if one.samples_per_pack else one.tokens_per_pack
        self.telemetry = Telemetry({source.name: source.probability for source in one.sources}, budget)
        self.packs_per_step = len(self.streams)
        self._mine = self.streams[self.rank :: self.world_size]
        self._done = 0
        self._cursors = {stream.number: stream.start() for stream in self.streams}
        self._history = {0: dict(self._cursors)}

    def _batches(self) -> Iterator[tuple[LoadedBatch, StreamMade]]:
        size = self.packs_per_forward
        batches = [self._mine[i * size : (i + 1) * size] for i in range(self.batches_per_step)]
        dataset = StreamDataset(batches, self.make_sample, self.collate)
        self._cursors = dict(self._history[self._done])
        dataset.cursors = dict(self._cursors)
        return (item for item in self._from_workers(dataset, dataset.workers(self.num_workers)) if item is not None)

    def _received(self, made: StreamMade) -> None:
        self._cursors |= made.cursors
        drawn = np.array(made.drawn, dtype=np.float64).reshape(-1, 4)
        for source in np.unique(drawn[:, 0]).astype(int).tolist():
            here = drawn[drawn[:, 0] == source]
            self.telemetry.add_examples(source, len(here), float(here[:, 2].sum()), int(here[:, 1].max()))
        self.telemetry.add_too_long(made.too_long)
        self.telemetry.add_packs(made.num_packs, int(drawn[:, 3].sum()))

    def _finished(self, step: int) -> None:
        self._history[step] = dict(self._cursors)
        self._history.pop(step - KEPT_STEPS, None)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Some 50 bytes for each stream and source.

        Call it on every rank: where torch.distributed runs, the ranks put their cursors together; ranks that are played
        in one process hand their states to `merge_states`.
        """
        step = self._done if step is None else step
        if step not in self._history:
            raise KeyError(f"no state for step {step}: {self._done} steps were handed out, the last 100 are kept")
        cursors = {str(s.number): self._history[step][s.number].to_json() for s in self._mine}
        state = {
            "version": STATE_VERSION,
            "step": step,
            "plan_hash": plan_hash(self.inputs),
            "inputs": self.inputs,
            "streams": cursors,
            "seen": self.telemetry.state_dict(),
        }
        if self.world_size > 1 and dist.is_initialized():
            states: list[dict[str, Any]] = [{}] * self.world_size
            dist.all_gather_object(states, state)
            return merge_states(states)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a saved state, on any number of ranks.

        Raises:
            DataStateError: an input has changed, or the state is that of some of the ranks alone.
        """
        if changed := changed_inputs(state, self.inputs):
            raise other_data(changed)
        missing = [s.number for s in self.streams if str(s.number) not in state["streams"]]
        if missing:
            raise DataStateError(f"the state lacks the streams {missing}: it was saved by some of the ranks alone")
        self._done = state["step"]
        cursors = {s.number: StreamCursor.from_json(state["streams"][str(s.number)]) for s in self.streams}
        self._history = {self._done: cursors}
        if self.rank == 0:  # totals are summed over the ranks when they are saved
            self.telemetry.load_state_dict(state["seen"])


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of all ranks from those that each of them has."""
    merged = dict(states[0])
    merged["streams"] = {number: cursor for state in states for number, cursor in state["streams"].items()}
    merged["seen"] = Telemetry.add_states([state["seen"] for state in states])
    return merged
