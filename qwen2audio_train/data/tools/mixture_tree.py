"""The mixture of a recipe as a tree: what its groups and sources hold, how often they are drawn, and fingerprints.

Shares are of the examples drawn. Where clips of one source are longer than those of another, its share of the hours is
another; it stands beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qwen2audio_train.config.data import DataConfig
from qwen2audio_train.data.order.index import Index
from qwen2audio_train.data.order.mixture import weighting_of

HEAD = ("mixture", "share", "of the hours", "examples", "hours", "audio tokens", "text tokens", "passes", "fingerprint")


@dataclass
class Node:
    """A group or a source.

    Attributes:
        share: probability that an example is drawn from here.
        drawn_s: seconds of audio that a draw from the whole mixture brings from here, on average.
        passes: most passes over a source; None for a group, and where there is no bound.
        fingerprint: of a source's index (content and all that its lengths depend on); of a group's, of those below it
            with their shares.
    """

    name: str
    share: float = 0.0
    drawn_s: float = 0.0
    examples: int = 0
    seconds: float = 0.0
    audio_tokens: int = 0
    text_tokens: int = 0
    passes: float | None = None
    fingerprint: str = ""
    below: list[Node] = field(default_factory=list)


def mixture_tree(data: DataConfig, indexes: Mapping[str, Index]) -> Node:
    """The tree over opened sources.

    Raises:
        ConfigError: weights that do not fit each other.
    """
    sizes = {
        name: min(len(index), data.sources[name].max_examples or len(index)) for name, index in sorted(indexes.items())
    }
    chances = weighting_of(data, sizes).probabilities(data.temperature)
    root = Node("all")
    for name in sizes:
        place = root
        for group in filter(None, data.sources[name].group.split("/")):
            found = next((node for node in place.below if node.name == f"{group}/"), None)
            place.below += [] if found else [Node(f"{group}/")]
            place = found or place.below[-1]
        place.below.append(_leaf(name, indexes[name], sizes[name], chances[name], data.sources[name].epochs))
    return _summed(root)


def _leaf(name: str, index: Index, size: int, share: float, passes: float | None) -> Node:
    records = index.records[:size]
    seconds = float(records["duration_s"].sum(dtype=np.float64))
    audio, text = (int(records[kind].sum(dtype=np.int64)) for kind in ("audio_tokens", "text_tokens"))
    return Node(name, share, share * seconds / size, size, seconds, audio, text, passes, index.fingerprint[:12])


def _summed(node: Node) -> Node:
    """The group with the sums of what is below it, largest share first."""
    if not node.below:
        return node
    for child in node.below:
        _summed(child)
    node.below.sort(key=lambda child: (-child.share, child.name))
    for name in ("share", "drawn_s", "examples", "seconds", "audio_tokens", "text_tokens"):
        setattr(node, name, sum(getattr(child, name) for child in node.below))
    told = "|".join(f"{child.name} {child.share:.6f} {child.passes} {child.fingerprint}" for child in node.below)
    node.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:12]
    return node


def tree_text(root: Node) -> str:
    """The tree in lines, its figures in columns."""
    rows = [HEAD, *_rows(root, root, "", "")]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def _rows(node: Node, root: Node, before: str, indent: str) -> Iterator[Sequence[str]]:
    yield (
        before + node.name,
        f"{node.share:.1%}",
        f"{node.drawn_s / root.drawn_s:.1%}" if root.drawn_s else "",
        f"{node.examples:,}",
        f"{node.seconds / 3600:,.2f}",
        f"{node.audio_tokens:,}",
        f"{node.text_tokens:,}" if root.text_tokens else "",
        "" if node.passes is None else f"{node.passes:g}",
        node.fingerprint,
    )
    for child in node.below:
        last = child is node.below[-1]
        yield from _rows(child, root, indent + ("└─ " if last else "├─ "), indent + ("   " if last else "│  "))
