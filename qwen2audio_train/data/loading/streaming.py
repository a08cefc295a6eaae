"""The loader over logical streams: the same steps, batches and promises as `PackLoader`, without an index.

Reading and planning run in the workers, each of which has whole streams to itself; a batch comes back with the cursors
of its streams, and these are the state. So the state of a step is spread over the ranks until it is put together.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from qwen2audio_train.data.loading.logical_stream import Drawn, LogicalStream, Raw, StreamCursor, StreamPack
from qwen2audio_train.data.loading.telemetry import Telemetry
from qwen2audio_train.data.order.state import STATE_VERSION, DataStateError, differences, plan_hash
from qwen2audio_train.data.quarantine import BadExample, Quarantine
from qwen2audio_train.data.samples.collate import Batch
from qwen2audio_train.data.samples.sample import Sample

KEPT_STEPS = 100

MakeSample = Callable[[Raw, int, int], Sample]
"""(example, number of its source, pass over the source) -> Sample."""


@dataclass
class StreamMade:
    """What comes beside a batch: cursors of its streams, what it holds per source, and what it could not hold."""

    cursors: dict[int, StreamCursor] = field(default_factory=dict)
    bad: list[BadExample] = field(default_factory=list)
    drawn: list[tuple[int, int, float, int]] = field(default_factory=list)
    """(source, pass, seconds, tokens) of every example."""
    too_long: list[int] = field(default_factory=list)
    num_packs: int = 0
    seconds: float = 0.0
    decode_s: float = 0.0


class StreamDataset(IterableDataset[tuple[Batch, StreamMade]]):
    """Batches of one rank, in the order of its slots; each worker has every n-th of them."""

    def __init__(
        self,
        streams: Sequence[Sequence[LogicalStream]],
        make_sample: MakeSample,
        collate: Callable[[list[Sample]], Batch],
    ) -> None:
        """`streams[b]` feed batch b of every step; none at all make it a filler."""
        self.streams, self.make_sample, self.collate = streams, make_sample, collate
        self.cursors: dict[int, StreamCursor] = {}

    def __iter__(self) -> Iterator[tuple[Batch, StreamMade]]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = self.streams[first::every]
        running = {s.number: s.packs(self.cursors.get(s.number, s.start())) for batch in mine for s in batch}
        while True:
            for batch in mine:
                yield self._batch([(stream, running[stream.number]) for stream in batch])

    def _batch(self, streams: list[tuple[LogicalStream, Iterator[StreamPack]]]) -> tuple[Batch, StreamMade]:
        began = time.perf_counter()
        samples: list[Sample] = []
        made = StreamMade()
        for stream, packs in streams:
            pack = next(packs)
            made.cursors[stream.number] = pack.after
            made.bad += pack.bad
            made.too_long += [item.source for item in pack.too_long]
            made.num_packs += bool(pack.drawn)
            for item in pack.drawn:
                made.drawn.append((item.source, item.number, item.measured.duration_s, item.tokens))
                self._add(samples, made, item, stream.sources[item.source].name)
        made.seconds = time.perf_counter() - began
        made.decode_s = sum(sample.decode_s for sample in samples)
        return self.collate(samples), made

    def _add(self, samples: list[Sample], made: StreamMade, item: Drawn, source: str) -> None:
        try:
            samples.append(self.make_sample(item.raw, item.source, item.number))
        except Exception as error:  # whatever is wrong with an example costs this example alone
            made.bad.append(BadExample.of(error, item.raw.example.id, source))


@dataclass
class StreamLoader:
    """Packed batches for one rank, step by step, without end; see `PackLoader`.

    Args:
        streams: all logical streams of a step, in order; slot j falls to rank j % world_size.
        inputs: everything that decides what the streams hold, as plain values.
        tasks: the task of every source's first example ("chat", "preference" for those forms).
    """

    streams: tuple[LogicalStream, ...]
    make_sample: MakeSample
    collate: Callable[[list[Sample]], Batch]
    inputs: dict[str, Any]
    tasks: dict[str, tuple[str, ...]]
    quarantine: Quarantine
    rank: int = 0
    world_size: int = 1
    packs_per_forward: int = 1
    num_workers: int = 0
    prefetch_factor: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks")
        one = self.streams[0]
        budget = None if one.samples_per_pack else one.tokens_per_pack
        self.telemetry = Telemetry({source.name: source.probability for source in one.sources}, budget)
        self._mine = self.streams[self.rank :: self.world_size]
        self._done = 0
        self._history = {0: {stream.number: stream.start() for stream in self.streams}}

    @property
    def source_names(self) -> tuple[str, ...]:
        """Name of every `source_id`."""
        return tuple(source.name for source in self.streams[0].sources)

    @property
    def batches_per_step(self) -> int:
        """Batches of one optimiser step on each rank: the number of gradient accumulation steps."""
        return math.ceil(math.ceil(len(self.streams) / self.world_size) / self.packs_per_forward)

    @property
    def steps_done(self) -> int:
        """Optimiser steps that were handed out whole, since the very start of the run."""
        return self._done

    def __iter__(self) -> Iterator[Batch]:
        size = self.packs_per_forward
        batches = [self._mine[i * size : (i + 1) * size] for i in range(self.batches_per_step)]
        dataset = StreamDataset(batches, self.make_sample, self.collate)
        cursors = dataset.cursors = dict(self._history[self._done])
        workers = max((n for n in range(1, self.num_workers + 1) if len(batches) % n == 0), default=0)
        loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.prefetch_factor if workers else None,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            # Of its own: one draw from the global generator, and dropout would differ after a resume.
            generator=torch.Generator(),
        )
        made = iter(loader)
        while True:
            for place in range(len(batches)):
                began = time.perf_counter()
                batch, info = next(made)
                cursors |= info.cursors
                self._count(info, time.perf_counter() - began)
                if place + 1 == len(batches):
                    self._done += 1
                    self._history[self._done] = dict(cursors)
                    self._history.pop(self._done - KEPT_STEPS, None)
                yield batch

    def _count(self, made: StreamMade, wait_s: float) -> None:
        self.telemetry.add_work(made.seconds, made.decode_s, wait_s, made.bad)
        drawn = np.array(made.drawn, dtype=np.float64).reshape(-1, 4)
        for source in np.unique(drawn[:, 0]).astype(int).tolist():
            here = drawn[drawn[:, 0] == source]
            self.telemetry.add_examples(source, len(here), float(here[:, 2].sum()), int(here[:, 1].max()))
        self.telemetry.add_too_long(made.too_long)
        self.telemetry.add_packs(made.num_packs, int(drawn[:, 3].sum()))
        self.quarantine.add(len(made.drawn) + sum(1 for b in made.bad), made.bad)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The state behind `step` optimiser steps: some 50 bytes for each stream and source.

        Call it on every rank: where torch.distributed runs, the ranks put their cursors together; ranks that are played
        in one process hand their states to `merge_states`.

        Raises:
            KeyError: the step was not handed out, or lies more than 100 steps back.
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
        """Go on behind a saved state, on any number of ranks.

        Raises:
            DataStateError: an input has changed, or the state is that of some of the ranks alone.
        """
        if state.get("version") != STATE_VERSION:
            raise DataStateError(f"a data state of version {state.get('version')}; this is version {STATE_VERSION}")
        if changed := differences(state["inputs"], json.loads(json.dumps(self.inputs))):
            listed = "".join(f"\n  {line}" for line in changed)
            raise DataStateError(
                f"the data are not those that the state was saved with, so it cannot be resumed exactly:{listed}\n"
                "Put them back as they were, or start a new run from the checkpoint's weights."
            )
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


def _unchanged(item: Any) -> Any:
    return item
