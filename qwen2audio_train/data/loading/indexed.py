"""The loader: steps of packed batches, planned here, materialised in workers, resumed exactly.

The main process plans on metadata and hands out requests (which examples stand in which pack); workers only turn them
into tensors. So neither the number of workers nor how far they have run ahead has any part in the state.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from qwen2audio_train.config.data import OnChangedData
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.loading.base import BatchLoader, Made, Making, Seen, check_rank
from qwen2audio_train.data.loading.telemetry import Telemetry
from qwen2audio_train.data.order.index import Index
from qwen2audio_train.data.order.planner import Cursor, Pack, Planner, deal, steps
from qwen2audio_train.data.order.state import DataStateError, inputs_of, restore, save_state
from qwen2audio_train.data.quarantine import Quarantine, costing_one_example
from qwen2audio_train.data.samples.collate import LoadedBatch
from qwen2audio_train.data.samples.sample import Sample

KEPT_MARKS = 1000

WINDOWS_AHEAD = 4
"""Windows whose remote shards are fetched before they are needed."""

Materialise = Callable[[Example, int, int], Sample]
"""(example, number of its source, pass over the source) -> Sample."""


@dataclass(frozen=True)
class PackDataset(Dataset[tuple[LoadedBatch, Made]]):
    """From a request, rows (n, 3) of (source, pass, example), to a packed batch. Runs in the workers."""

    names: tuple[str, ...]
    indexes: tuple[Index, ...]
    materialise: Materialise
    collate: Callable[[list[Sample]], LoadedBatch]

    def __getitem__(self, rows: NDArray[np.int64]) -> tuple[LoadedBatch, Made]:
        making = Making()
        for source, number, position in rows.tolist():
            name = self.names[source]
            with costing_one_example(making.bad, f"{name}#{position}", name) as suspect:
                example = self.indexes[source].read(position)
                suspect.example = example.id
                making.samples.append(self.materialise(example, source, number))
        return self.collate(making.samples), Made.of(making)


@dataclass
class _Mark:
    """Cursor after a step, the packs of that step, and a checksum of these."""

    cursor: Cursor
    packs: list[Pack]
    left_out: NDArray[np.int64]
    plan: int


@dataclass
class PackLoader(BatchLoader[Made]):
    """Batches of indexed sources, endlessly or for `epochs`."""

    planner: Planner
    dataset: PackDataset
    packs_per_step: int
    quarantine: Quarantine
    rank: int = 0
    world_size: int = 1
    packs_per_forward: int = 1
    epochs: int | None = None
    num_workers: int = 0
    prefetch_factor: int = 4
    on_changed_data: OnChangedData = OnChangedData.refuse
    prefetch: Callable[[str], object] | None = None
    num_bad_lines: int = 0

    def __post_init__(self) -> None:
        check_rank(self.rank, self.world_size)
        self.tasks = {n: tuple(i.task_counts) for n, i in zip(self.dataset.names, self.planner.indexes, strict=True)}
        self.inputs = inputs_of(self.planner, self.packs_per_step)
        budget = self.planner.tokens_per_pack if self.planner.samples_per_pack is None else None
        self.telemetry = Telemetry({s.name: s.probability for s in self.planner.mixture.sources}, budget)
        self._start, self._start_step = Cursor(), 0
        self._marks: dict[int, _Mark] = {}
        self._done = 0
        self._looked_from = (-1, -1)

    def seen(self) -> Seen:
        """What became of the examples of the steps handed out."""
        planned, too_long = int(self.telemetry.examples.sum()), int(self.telemetry.too_long.sum())
        return Seen(planned, too_long, self.num_bad_lines, self.quarantine.num_bad - self.num_bad_lines)

    def num_steps(self, epochs: int = 1) -> int:
        """Optimiser steps of the first epochs, by planning them."""
        return -(-self.planner.num_slots(epochs) // self.packs_per_step)

    def last_step(self, at_most: int) -> int | None:
        if self.epochs is None and any(source.max_passes is None for source in self.planner.mixture.sources):
            return None
        wanted = (at_most - self._start_step) * self.packs_per_step
        found = sum(1 for _ in islice(self.planner.slots(self._start, self.epochs), wanted))
        return None if found == wanted else self._start_step + -(-found // self.packs_per_step)

    def is_over(self, state: dict[str, Any]) -> bool:
        try:
            planner, cursor = restore(self.planner, self.packs_per_step, state, OnChangedData.refuse)
        except DataStateError:
            return False
        return next(planner.slots(cursor, self.epochs), None) is None

    def examples_of(self, step: int) -> list[str]:
        before = self._start if step - 1 == self._start_step else self._marks[step - 1].cursor
        packs, _, _ = next(steps(self.planner, before, self.packs_per_step, self.epochs))
        rows = np.concatenate([pack.rows for pack in packs]).tolist()
        return [self.dataset.indexes[source].read(position).id for source, _, position in rows]

    @property
    def plan(self) -> int:
        mark = self._marks.get(self._done)
        return 0 if mark is None else mark.plan

    def _batches(self) -> Iterator[tuple[LoadedBatch, Made]]:
        self._rewind_to(self._done)
        made: Iterator[tuple[LoadedBatch, Made]] = self._from_workers(
            self.dataset, self.num_workers, _Requests(self._requests)
        )
        return made

    def _received(self, made: Made) -> None:
        """Everything is known of the plan when the step is whole."""

    def _requests(self) -> Iterator[NDArray[np.int64]]:
        number = self._start_step
        for packs, cursor, left_out in steps(self.planner, self._start, self.packs_per_step, self.epochs):
            number += 1
            self._look_ahead(cursor)
            plan = zlib.crc32(b"|".join(pack.rows.tobytes() for pack in packs))
            self._marks[number] = _Mark(cursor, packs, left_out, plan)
            mine = deal(packs, self.world_size)[self.rank]
            for first in range(0, len(mine), self.packs_per_forward):
                yield np.concatenate([pack.rows for pack in mine[first : first + self.packs_per_forward]])

    def _look_ahead(self, cursor: Cursor) -> None:
        """Have the remote shards of the next windows fetched, once per window."""
        if self.prefetch is None or not any(index.is_remote for index in self.planner.indexes):
            return
        place = (cursor.epoch, cursor.window)
        if place != self._looked_from:
            self._looked_from = place
            for window in range(cursor.window, cursor.window + WINDOWS_AHEAD):
                for url in self.planner.remote_shards(cursor.epoch, window):
                    self.prefetch(url)

    def _finished(self, step: int) -> None:
        mark = self._marks[step]
        rows = np.concatenate([pack.rows for pack in mark.packs])
        for source in np.unique(rows[:, 0]).tolist():
            here = rows[rows[:, 0] == source]
            seconds = float(self.planner.indexes[source].records[here[:, 2]]["duration_s"].sum(dtype=np.float64))
            self.telemetry.add_examples(source, len(here), seconds, int(here[:, 1].max()))
        self.telemetry.add_too_long(mark.left_out[:, 0])
        full = [pack for pack in mark.packs if len(pack.rows)]
        self.telemetry.add_packs(len(full), sum(pack.tokens for pack in full))
        mark.packs = []
        self._marks.pop(step - KEPT_MARKS, None)

    def _rewind_to(self, step: int) -> None:
        if step != self._start_step:
            self._start, self._start_step = self._marks[step].cursor, step
        self._marks = {}

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        step = self._done if step is None else step
        if step == self._start_step:
            cursor = self._start
        elif step in self._marks and step <= self._done:
            cursor = self._marks[step].cursor
        else:
            raise KeyError(f"no state for step {step}: {self._done} steps were handed out, the last 1 000 are kept")
        state = save_state(self.planner, self.packs_per_step, step, cursor)
        return state | {"seen": self.telemetry.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.planner, self._start = restore(self.planner, self.packs_per_step, state, self.on_changed_data)
        self._start_step = self._done = state["step"]
        self._marks = {}
        self.telemetry.load_state_dict(state["seen"])


class _Requests(Sampler[NDArray[np.int64]]):
    """A sampler for DataLoader: it must be an object whose `iter` starts anew."""

    def __init__(self, make: Callable[[], Iterator[NDArray[np.int64]]]):
        self._make = make

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return self._make()
