"""Draws that depend on nothing but their key."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def generator(*key: object) -> np.random.Generator:
    """A random generator that depends on the key alone."""
    digest = hashlib.sha256("|".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def balanced(
    items: Sequence[Item], key: Callable[[Item], Hashable], count: int, rng: np.random.Generator
) -> list[Item]:
    """`count` items, every value of `key` as often as the others; items come again where there are too few."""
    groups: dict[Hashable, list[Item]] = {}
    for index in rng.permutation(len(items)):
        groups.setdefault(key(items[index]), []).append(items[index])
    turns = [itertools.cycle(groups[name]) for name in sorted(groups, key=str)]
    order = itertools.cycle([turns[i] for i in rng.permutation(len(turns))])
    return [next(turn) for turn in itertools.islice(order, count)]
