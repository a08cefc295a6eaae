"""What the loader tells the log: per source what was seen, how full the packs are, and how long the model waited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2audio_train.data.quarantine import BadExample


class Telemetry:
    """Counts of the steps handed out.

    Args:
        weights: every source's share of the examples, as configured, in the order of the sources' numbers.
        tokens_per_pack: budget of a pack; None where packs have no token budget.
    """

    def __init__(self, weights: Mapping[str, float], tokens_per_pack: int | None):
        self.weights, self.tokens_per_pack = dict(weights), tokens_per_pack
        self.examples = np.zeros(len(weights), dtype=np.int64)
        self.hours = np.zeros(len(weights))
        self.too_long = np.zeros(len(weights), dtype=np.int64)
        self.last_pass = np.zeros(len(weights), dtype=np.int64)
        self._reset()

    def _reset(self) -> None:
        self._tokens = self._packs = 0
        self._wait_s = self._work_s = self._decode_s = 0.0
        self._bad: dict[str, int] = {}

    def add_examples(self, source: int, number: int, seconds: float, last_pass: int) -> None:
        """Count `number` examples of a source, of so many seconds, the last of them in pass `last_pass`."""
        self.examples[source] += number
        self.hours[source] += seconds / 3600
        self.last_pass[source] = max(self.last_pass[source], last_pass)

    def add_too_long(self, sources: Sequence[int] | NDArray[np.int64]) -> None:
        """Count examples that no pack takes, by their sources."""
        self.too_long += np.bincount(np.asarray(sources, dtype=np.int64), minlength=len(self.weights))

    def add_packs(self, number: int, tokens: int) -> None:
        """Count packs that are no fillers."""
        self._packs += number
        self._tokens += tokens

    def add_work(self, work_s: float, decode_s: float, wait_s: float, bad: Sequence[BadExample]) -> None:
        """Count a batch of this rank: seconds of work in its worker, those of them that went into reading and decoding
        audio, seconds waited for it, and what it could not hold."""
        self._work_s += work_s
        self._decode_s += decode_s
        self._wait_s += wait_s
        for item in bad:
            self._bad[item.source] = self._bad.get(item.source, 0) + 1

    def take(self) -> dict[str, float]:
        """Figures for the log; those that are no totals cover the time since the last call, on this rank.

        `<source>/examples`, `/hours`, `/pass`, `/share` and `/weight` (drawn so far, and as configured), `/too_long`,
        `/quarantined`; `fill` = tokens of a pack over its budget; `wait_s`, `materialise_s` and, within
        it, `decode_s`. The totals of indexed sources cover all ranks, those of streams this rank.
        """
        total = max(int(self.examples.sum()), 1)
        log: dict[str, float] = {
            "wait_s": self._wait_s,
            "materialise_s": self._work_s,
            "decode_s": self._decode_s,
        }
        if self._packs and self.tokens_per_pack is not None:
            log["fill"] = self._tokens / (self._packs * self.tokens_per_pack)
        for number, (name, weight) in enumerate(self.weights.items()):
            log |= {
                f"{name}/examples": int(self.examples[number]),
                f"{name}/hours": float(self.hours[number]),
                f"{name}/pass": int(self.last_pass[number]),
                f"{name}/share": float(self.examples[number] / total),
                f"{name}/weight": weight,
                f"{name}/too_long": int(self.too_long[number]),
                f"{name}/quarantined": self._bad.get(name, 0),
            }
        self._reset()
        return log

    def state_dict(self) -> dict[str, Any]:
        return {
            name: [int(self.examples[i]), float(self.hours[i]), int(self.too_long[i]), int(self.last_pass[i])]
            for i, name in enumerate(self.weights)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, name in enumerate(self.weights):
            self.examples[i], self.hours[i], self.too_long[i], self.last_pass[i] = state.get(name, [0, 0.0, 0, 0])

    @staticmethod
    def add_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The totals of all ranks from those of each."""
        merged = {}
        for name in states[0]:
            *sums, passes = zip(*(state[name] for state in states), strict=True)
            merged[name] = [*map(sum, sums), max(passes)]
        return merged
