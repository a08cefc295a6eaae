"""Which example stands at a position: the weighted mixture of the sources, without replay.

An epoch of the mixture is a fixed number of positions in which source s appears `counts[s]` times, spread evenly: a
binary tree over the sources splits every run of positions by whole-number proportions, so that the place of a position
within its source follows from a few divisions. The r-th draw of a source is example r % size of its pass r // size,
and every pass has an order of its own. All of it is a pure function of (seed, epoch, position).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qwen2audio_train.config.data import DataConfig, GroupConfig, Order
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.order.permutation import hash_key, permute, permute_in_groups

MAX_EPOCH = 2**31
"""Positions of an epoch, bounded so that products of two counts fit into 63 bits."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class MixedSource:
    """What the mixture knows of a source.

    `by_length` (size,) lists its examples from short to long. `shards` are the numbers of examples in its shards, where
    the order is to stay within a few of them at a time, since they are fetched from afar.
    """

    name: str
    size: int
    probability: float
    max_passes: float | None = None
    by_length: NDArray[np.integer] | None = field(default=None, repr=False)
    shards: Ints | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Mixture:
    """The order of all examples. `first_draw[s]` draws of source s count as done before epoch 0 begins."""

    sources: tuple[MixedSource, ...]
    seed: int
    order: Order = Order.shuffled
    first_draw: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        total = sum(s.size for s in self.sources)
        if not 0 < total < MAX_EPOCH:
            raise ConfigError(f"a mixture needs between 1 and {MAX_EPOCH - 1} examples, found {total}")

    def _full_counts(self) -> Ints:
        """Draws per source in an epoch in which none has reached its cap; sums up to the sources' total size."""
        sizes = [s.size for s in self.sources]
        return apportion([s.probability for s in self.sources], sum(sizes))

    def draws_before(self, epoch: int) -> Ints:
        """Draws of every source before `epoch`."""
        first = np.array(self.first_draw or [0] * len(self.sources), dtype=np.int64)
        unlimited = np.iinfo(np.int64).max
        caps = [unlimited if s.max_passes is None else round(s.max_passes * s.size) for s in self.sources]
        return np.maximum(np.minimum(first + epoch * self._full_counts(), caps), np.minimum(first, caps))

    def counts(self, epoch: int) -> Ints:
        """Draws of every source in `epoch`; all zero once every source has reached its cap."""
        return self.draws_before(epoch + 1) - self.draws_before(epoch)

    def epoch_size(self, epoch: int) -> int:
        return int(self.counts(epoch).sum())

    def draws_at(self, epoch: int, position: int) -> Ints:
        """Draws of every source before `position` of `epoch`."""
        tree = PositionTree(self.seed, epoch, self.counts(epoch))
        return self.draws_before(epoch) + tree.counts_before(position, 0, len(self.sources))

    def locate(self, epoch: int, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """(source, pass, example) of the positions [start, stop) of `epoch`."""
        source = np.empty(stop - start, dtype=np.int64)
        draw = np.empty(stop - start, dtype=np.int64)
        where = np.arange(stop - start)
        tree = PositionTree(self.seed, epoch, self.counts(epoch))
        tree.place(where + start, where, source, draw, 0, len(self.sources))
        draw += self.draws_before(epoch)[source]
        sizes = np.array([max(s.size, 1) for s in self.sources])
        number, place = np.divmod(draw, sizes[source])
        return source, number, self._examples(source, number, place)

    def _examples(self, source: Ints, number: Ints, place: Ints) -> Ints:
        example = place.copy()
        if self.order == Order.sequential:
            return example
        for s, p in {*zip(source.tolist(), number.tolist(), strict=True)}:
            rows = (source == s) & (number == p)
            spec = self.sources[s]
            if self.order == Order.short_first and p == 0 and spec.by_length is not None:
                example[rows] = spec.by_length[place[rows]]
                continue
            key = hash_key(self.seed, "order", spec.name, p)
            if spec.shards is not None:
                example[rows] = permute_in_groups(place[rows], spec.shards, key)
            else:
                example[rows] = permute(place[rows], spec.size, key)
        return example


class PositionTree:
    """Interleaves the sources of an epoch evenly.

    Of the first t positions the left half of the sources has floor((t * L + phase) / total), where L is the number of
    its draws in the epoch and total that of both halves. The same rule, applied to halves of halves, gives source and
    draw number of a position in O(log sources); no source is more than one draw per level away from its share.
    """

    def __init__(self, seed: int, epoch: int, counts: Ints):
        self.seed, self.epoch = seed, epoch
        self.edges = np.concatenate([[0], np.cumsum(counts)])

    def _left_before(self, t: Ints, lo: int, mid: int, hi: int) -> Ints:
        total, left = int(self.edges[hi] - self.edges[lo]), int(self.edges[mid] - self.edges[lo])
        phase = hash_key(self.seed, "phase", self.epoch, lo, hi) % max(total, 1)
        return (t * left + phase) // max(total, 1)

    def place(self, t: Ints, where: Ints, source: Ints, draw: Ints, lo: int, hi: int) -> None:
        """Write source and draw of the positions `t` among the sources [lo, hi) to the places `where`."""
        if t.size == 0:
            return
        if hi - lo == 1:
            source[where], draw[where] = lo, t
            return
        mid = (lo + hi) // 2
        # A position is the left half's where its count goes up there; log2(sources) halvings, all positions at once.
        before = self._left_before(t, lo, mid, hi)
        is_left = self._left_before(t + 1, lo, mid, hi) > before
        self.place(before[is_left], where[is_left], source, draw, lo, mid)
        self.place((t - before)[~is_left], where[~is_left], source, draw, mid, hi)

    def counts_before(self, t: int, lo: int, hi: int) -> Ints:
        """How many of the first `t` positions each of the sources [lo, hi) has."""
        if hi - lo == 1:
            return np.array([t], dtype=np.int64)
        mid = (lo + hi) // 2
        left = int(self._left_before(np.array([t]), lo, mid, hi)[0])
        return np.concatenate([self.counts_before(left, lo, mid), self.counts_before(t - left, mid, hi)])


def apportion(shares: Sequence[float], total: int) -> Ints:
    """Whole numbers that sum up to `total` in proportion to `shares`: largest remainders, ties to the first."""
    exact = np.asarray(shares, dtype=np.float64) / np.sum(shares) * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


@dataclass(frozen=True)
class Weighting:
    """Sizes and weights of the sources, the group that each is in ("a/b", "" = none), and the groups' settings."""

    sizes: Mapping[str, int]
    weights: Mapping[str, float | None]
    group_of: Mapping[str, str]
    groups: Mapping[str, GroupConfig]

    def probabilities(self, temperature: float = 1.0) -> dict[str, float]:
        """Sampling probability of every source.

        On every level of the groups' tree the siblings share what their parent has: p ~ weight ** (1 / temperature),
        where an unset weight is the number of examples, and either all siblings have a weight or none has.

        Raises:
            ConfigError: a weight or temperature not above 0, siblings with and without a weight, a group of nobody.
        """
        used = {path[:end] for path in self.group_of.values() for end, sign in enumerate(path + "/") if sign == "/"}
        if unknown := sorted(set(self.groups) - used):
            raise ConfigError(f"no source is in group {', '.join(unknown)}; the groups are {', '.join(sorted(used))}")
        return self._share("", 1.0, sorted(self.sizes), temperature)

    def _share(self, path: str, total: float, names: list[str], temperature: float) -> dict[str, float]:
        where = f"group {path!r}" if path else "the top level"
        if not temperature > 0:
            raise ConfigError(f"the temperature of {where} must be above 0, found {temperature}")
        below: dict[str, list[str]] = {}
        for name in names:
            if self.group_of[name] != path:
                rest = self.group_of[name][len(path) :].lstrip("/")
                below.setdefault(f"{path}/{rest.split('/')[0]}/".lstrip("/"), []).append(name)
        here = [name for name in names if self.group_of[name] == path]
        given = {name: self.weights[name] for name in here}
        given |= {group: self._group(group).weight for group in below}
        _check_siblings(where, given)
        size = {name: self.sizes[name] for name in here}
        size |= {group: sum(self.sizes[name] for name in members) for group, members in below.items()}
        raw = {key: (size[key] if weight is None else weight) ** (1 / temperature) for key, weight in given.items()}
        share = {key: total * value / sum(raw.values()) for key, value in raw.items()}
        out = {name: share[name] for name in here}
        for group, members in below.items():
            out |= self._share(group[:-1], share[group], members, self._group(group).temperature)
        return out

    def _group(self, path: str) -> GroupConfig:
        return self.groups.get(path.rstrip("/"), GroupConfig())


def _check_siblings(where: str, weight: Mapping[str, float | None]) -> None:
    bad = {key: w for key, w in weight.items() if w is not None and not w > 0}
    if bad:
        raise ConfigError(f"weights in {where} must be above 0, found {bad}; leave the source out instead")
    unset = [key for key, w in weight.items() if w is None]
    if unset and len(unset) < len(weight):
        raise ConfigError(f"in {where} either all have a weight or none; without one: {', '.join(sorted(unset))}")


def weighting_of(data: DataConfig, sizes: Mapping[str, int]) -> Weighting:
    """The weights that the recipe gives to its sources, whose sizes are in examples (of streams, in shards)."""
    weights = {name: data.sources[name].weight for name in sizes}
    return Weighting(sizes, weights, {name: data.sources[name].group.strip("/") for name in sizes}, data.groups)
