"""Answers that are written down as they come, so that an evaluation that was broken off goes on after them.

Every rank appends to a file of its own, and reads those of all; so the number of ranks may change in between. A key
holds all that decides an answer: the weights, the example with its clips, how it is made into a prompt and decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen2audio_train.data.examples import Example, clips_of
from qwen2audio_train.evaluation.decoding.ranks import rank_and_world


class KeptAnswers:
    """The answers of earlier runs to these examples, and where those of this run go.

    Attributes:
        known: answers by the example's place.
    """

    def __init__(self, folder: str | Path, examples: Sequence[Example], settings: Mapping[str, Any]) -> None:
        """`settings` are those that decide an answer beside the example; their values have a fixed `repr`."""
        self.path = Path(folder) / f"answers.{rank_and_world()[0]}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        made_by = repr(sorted(settings.items()))
        self.keys = [_digest(f"{made_by}{example!r}{_files(example)}") for example in examples]
        kept = {key: texts for path in sorted(self.path.parent.glob("answers.*.jsonl")) for key, texts in _read(path)}
        self.known: dict[int, list[str]] = {i: kept[key] for i, key in enumerate(self.keys) if key in kept}

    def add(self, answers: Mapping[int, Sequence[str] | None]) -> None:
        """Write down what was answered; what could not be loaded (None) is tried again by the next run."""
        lines = [
            json.dumps({"key": self.keys[i], "texts": list(texts)}, ensure_ascii=False)
            for i, texts in answers.items()
            if texts is not None
        ]
        # The line before may have been cut off by the end of the run that wrote it.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"\n{line}\n" for line in lines))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _files(example: Example) -> list[tuple[int, int]]:
    """Size and time of change of the files that the clips are in; of remote ones nothing is known."""
    paths = [Path(clip.path.partition("::")[0]) for clip in clips_of(example)]
    return [(path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]


def _read(path: Path) -> list[tuple[str, list[str]]]:
    """Whole lines of a file; one that was cut off is no answer."""
    found = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found.append((record["key"], record["texts"]))
    return found


@torch.no_grad()
def weights_key(model: nn.Module) -> str:
    """Names weights by what they are: name, shape, type, sum and sum of squares of every parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        values = weight.double()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        digest.update(repr([float(values.sum()), float(values.square().sum())]).encode())
    return digest.hexdigest()
