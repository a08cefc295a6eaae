"""The contract of the loaders: packed batches of one rank, step by step, with a state from which they go on exactly.

Every optimiser step is `packs_per_step` packs over all ranks. Each rank gets `batches_per_step` batches of it, fillers
included, each of `packs_per_forward` packs. Workers make the batches; the main process counts and hands them out.
"""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import PREFERENCE_TASKS
from qwen2audio_train.data.loading.telemetry import Telemetry
from qwen2audio_train.data.quarantine import BadExample, Quarantine
from qwen2audio_train.data.samples.collate import LoadedBatch
from qwen2audio_train.data.samples.sample import Sample


@dataclass
class Making:
    """A batch under construction in a worker: its samples, and the examples that gave none."""

    samples: list[Sample] = field(default_factory=list)
    bad: list[BadExample] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)


@dataclass
class Made:
    """What a worker hands back beside a batch.

    Attributes:
        num_examples: examples of the batch, the bad ones included.
        bad: those that could not be used.
        seconds: of work, `decode_s` of them in reading and decoding audio.
    """

    num_examples: int
    bad: list[BadExample]
    seconds: float
    decode_s: float

    @classmethod
    def of(cls, making: Making, **more: Any) -> Any:
        """What to hand back of a finished batch."""
        decode_s = sum(sample.decode_s for sample in making.samples)
        num_examples = len(making.samples) + len(making.bad)
        return cls(num_examples, making.bad, time.perf_counter() - making.began, decode_s, **more)


class Seen(NamedTuple):
    """Examples of the steps handed out: planned over all ranks, too long among these; bad lines of the sources, and
    examples that could not be used on this rank."""

    planned: int
    too_long: int
    bad_lines: int
    unusable: int


MadeT = TypeVar("MadeT", bound=Made)


class BatchLoader(ABC, Generic[MadeT]):
    """Packed batches for one rank. Iterating goes on after the last step whose batches were all handed out.

    Attributes:
        tasks: what every source holds ("chat", "preference"... for those forms), in the order of `source_id`.
        inputs: everything that decides what the steps hold, as plain values; a state is bound to it.
        packs_per_step: over all ranks.
        telemetry: counts for the log.
        quarantine: the examples that could not be used.
    """

    tasks: dict[str, tuple[str, ...]]
    inputs: dict[str, Any]
    packs_per_step: int
    telemetry: Telemetry
    quarantine: Quarantine
    rank: int
    world_size: int
    packs_per_forward: int
    num_workers: int
    prefetch_factor: int
    _done: int

    @abstractmethod
    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The state after `step` optimiser steps of the run (default: those handed out whole), as JSON has it.

        Raises:
            KeyError: the step was not handed out, or lies too far back.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a saved state, on any number of ranks and workers.

        Raises:
            DataStateError: what decides the steps has changed; says what.
        """

    def last_step(self, at_most: int) -> int | None:
        """The step after which the data end; None when that is after `at_most` steps, or never, as of streams."""
        return None

    def is_over(self, state: dict[str, Any]) -> bool:
        """Whether nothing comes after a saved state; false when what decides the order has changed since."""
        return False

    def examples_of(self, step: int) -> list[str]:
        """Ids of the examples of a step that was handed out lately; none where they are not kept, as of streams."""
        return []

    @property
    def plan(self) -> int:
        """A number below 2^32 that ranks share when they planned the last step alike; 0 where each has its own plan."""
        return 0

    @abstractmethod
    def _batches(self) -> Iterator[tuple[LoadedBatch, MadeT]]:
        """The batches of this rank after the steps handed out so far, from the workers."""

    @abstractmethod
    def _received(self, made: MadeT) -> None:
        """Count what has no step yet: called for every batch."""

    @abstractmethod
    def _finished(self, step: int) -> None:
        """Keep the state after a step: called when its last batch is handed out."""

    @property
    def source_names(self) -> tuple[str, ...]:
        """Name of every `source_id`."""
        return tuple(self.tasks)

    @property
    def batches_per_step(self) -> int:
        """Batches of one optimiser step on each rank: the number of gradient accumulation steps."""
        return math.ceil(math.ceil(self.packs_per_step / self.world_size) / self.packs_per_forward)

    @property
    def steps_done(self) -> int:
        """Optimiser steps that were handed out whole, since the very start of the run."""
        return self._done

    def __iter__(self) -> Iterator[LoadedBatch]:
        made = self._batches()
        while True:
            for place in range(self.batches_per_step):
                began = time.perf_counter()
                item = next(made, None)
                if item is None:
                    return
                batch, info = item
                self.telemetry.add_work(info.seconds, info.decode_s, time.perf_counter() - began, info.bad)
                self.quarantine.add(info.num_examples, info.bad)
                self._received(info)
                if place + 1 == self.batches_per_step:
                    self._done += 1
                    self._finished(self._done)
                yield batch

    def _from_workers(self, dataset: Dataset[Any], num_workers: int, sampler: Sampler[Any] | None = None) -> Any:
        """An iterator over what the workers make of a data set, a whole step of batches ahead of their use.

        The batches of a step are counted before its first forward. So what is ready has to reach over a step, or the
        rest of it would be made while the model waits: with 16 forwards a step and two workers that are a fifth faster
        than the model, 27 % of the time with four batches a worker ahead, and 5 % with a step ahead.
        """
        ahead = max(self.prefetch_factor, math.ceil(self.batches_per_step / max(num_workers, 1)))
        return iter(
            DataLoader(
                dataset,
                sampler=sampler,
                batch_size=None,
                num_workers=num_workers,
                prefetch_factor=ahead if num_workers else None,
                collate_fn=_unchanged,
                worker_init_fn=_set_apart,
                pin_memory=torch.cuda.is_available(),
                # Of its own: one draw from the global generator, and dropout would differ after a resume.
                generator=torch.Generator(),
            )
        )


def check_rank(rank: int, world_size: int) -> None:
    """Raises ValueError when there is no such rank."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks")


def are_preferences(tasks: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether sources hold preference examples, by the tasks of each.

    Raises:
        ConfigError: some do and some do not.
    """
    found = {task for of_source in tasks.values() for task in of_source}
    others = sorted(found - PREFERENCE_TASKS)
    if others and len(others) < len(found):
        raise ConfigError(f"data.sources: preference examples cannot be mixed with {', '.join(others)}")
    return bool(found) and not others


def _unchanged(item: Any) -> Any:
    return item


def _set_apart(worker: int) -> None:
    """Take a worker out of the group of processes that Ctrl-C reaches: the step that it works for is to be finished."""
    os.setpgrp()
