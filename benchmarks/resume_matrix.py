"""Exact resume, all of it: random interruptions x workers x changes of the world size, for indexed sources and streams.

    python benchmarks/resume_matrix.py            # 50 points x {0, 1, 4} workers x 4 changes of ranks, twice
    python benchmarks/resume_matrix.py --quick    # 3 points, 0 and 1 workers

Two sources of tones, weighted 2 to 1, over more than two epochs. A run on so many ranks is interrupted at every point
(its loaders have run ahead of what is saved, the more the more workers); loaders on another number of ranks load the
state from JSON and have to hand out, over all ranks, the packs of the uninterrupted run: as many, and equal in every
tensor. The point is drawn anew for every cell of the matrix. Prints a JSON line per cell; the last line has the totals.
Its exit status is 1 if any pack differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import soundfile
import torch
from record import save
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.batch import PackedBatch, tensors
from qwen2audio_train.config.data import DataConfig, SourceConfig
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.loading.streaming import StreamLoader, merge_states
from qwen2audio_train.data.prompts.tokenizer import train_tokenizer

WORLDS = ((1, 2), (2, 1), (2, 4), (4, 3))
SIZES = {"a": (60, 2.0), "b": (25, 1.0)}
STEPS, COMPARED = 20, 2
Steps = list[list[str]]


def write_sources(folder: Path, streaming: bool) -> dict[str, SourceConfig]:
    """Tones of 0.1 to 0.6 s, by a manifest or in tar files."""
    rng = np.random.default_rng(0)
    sources = {}
    for name, (size, weight) in SIZES.items():
        place = folder / name
        place.mkdir()
        lines = []
        for i, seconds in enumerate(rng.uniform(0.1, 0.6, size).round(3).tolist()):
            times = np.arange(round(16_000 * seconds)) / 16_000
            soundfile.write(place / f"{i}.wav", 0.4 * np.sin(2 * np.pi * (200 + 7 * i) * times), 16_000)
            (place / f"{i}.txt").write_text(f"hello {i}")
            line = {"id": f"{name}{i}", "audio": f"{name}/{i}.wav", "duration_s": seconds, "target": f"hello {i}"}
            lines.append(json.dumps({**line, "task": "asr", "language": "en"}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
        for shard in range(6):
            with tarfile.open(folder / f"{name}-{shard}.tar", "w") as tar:
                for i in range(shard, size, 6):
                    tar.add(place / f"{i}.wav", f"{i}.wav")
                    tar.add(place / f"{i}.txt", f"{i}.txt")
        if streaming:
            constants = {"task": "asr", "language": "en"}
            sources[name] = SourceConfig(
                [str(folder / f"{name}-*.tar")], weight=weight, constants=constants, streaming=True
            )
        else:
            sources[name] = SourceConfig([str(folder / f"{name}.jsonl")], weight=weight)
    return sources


def digest(batch: PackedBatch) -> str:
    """Names, types, shapes and bytes of all tensors."""
    hashed = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(tensors(batch).items()):
        hashed.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()


class Runs:
    """Loaders of one data config on any ranks and workers."""

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerFast):
        self.data, self.tokenizer = data, tokenizer

    def ranks(self, world: int, workers: int) -> list[BatchLoader[Any]]:
        data = dataclasses.replace(self.data, num_workers=workers)
        return [build_batches(data, self.tokenizer, rank=rank, world_size=world) for rank in range(world)]

    def packs(self, loaders: Sequence[BatchLoader[Any]], num_steps: int) -> Steps:
        """Digests of the packs of every step over all ranks, fillers left out, whichever rank has them."""
        streams = [iter(cast(Iterable[PackedBatch], loader)) for loader in loaders]
        made: Steps = []
        for _ in range(num_steps):
            batches = [next(s) for s, one in zip(streams, loaders, strict=True) for _ in range(one.batches_per_step)]
            made.append(sorted(digest(batch) for batch in batches if len(batch["target"])))
        return made

    def states(self, loaders: Sequence[BatchLoader[Any]]) -> list[str]:
        """What is saved behind each of the steps, as JSON."""
        states = []
        for step in range(STEPS + 1):
            found: list[dict[str, Any]] = [loader.state_dict(step) for loader in loaders]
            streaming = isinstance(loaders[0], StreamLoader)
            states.append(json.dumps(merge_states(found) if streaming else found[0]))
        return states

    def resumed(self, world: int, workers: int, state: str) -> Steps:
        loaders = self.ranks(world, workers)
        for loader in loaders:
            loader.load_state_dict(json.loads(state))
        return self.packs(loaders, COMPARED)


def run_matrix(kind: str, runs: Runs, points: int, num_workers: Sequence[int]) -> list[dict[str, Any]]:
    whole = runs.packs(runs.ranks(1, 0), STEPS + COMPARED)
    cells = []
    for workers in num_workers:
        states: dict[int, list[str]] = {}
        for before, after in WORLDS:
            if before not in states:
                first = runs.ranks(before, workers)
                if runs.packs(first, STEPS) != whole[:STEPS]:
                    raise SystemExit(f"{kind}: {before} ranks with {workers} workers give other packs than one rank")
                states[before] = runs.states(first)
            draw = random.Random(f"{kind} {workers} {before} {after}")
            stops = [draw.randrange(STEPS + 1) for _ in range(points)]
            wrong = [
                stop
                for stop in stops
                if runs.resumed(after, workers, states[before][stop]) != whole[stop : stop + COMPARED]
            ]
            cell = {"kind": kind, "workers": workers, "ranks": [before, after], "points": points, "wrong": wrong}
            cells.append(cell | {"state_bytes": max(map(len, states[before]))})
            print(json.dumps(cells[-1]), flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few points, 0 and 1 workers")
    parser.add_argument("--save", help="name of the file in results/ that keeps the figures")
    args = parser.parse_args()
    points, num_workers = (3, (0, 1)) if args.quick else (50, (0, 1, 4))
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(["hello 0123456789", "Recognize the English speech:"], 330, ["<|en|>"])
    cells: list[dict[str, Any]] = []
    for kind in ("indexed", "streams"):
        with tempfile.TemporaryDirectory() as folder:
            data = DataConfig(
                write_sources(Path(folder), kind == "streams"),
                cache_dir=folder,
                tokens_per_pack=120,
                packs_per_step=4,
                window_examples=32 if kind == "indexed" else 256,
                seed=1,
            )
            cells += run_matrix(kind, Runs(data, tokenizer), points, num_workers)
    wrong = sum(len(cell["wrong"]) for cell in cells)
    totals = {"interruptions": points * len(cells), "steps_compared": COMPARED * points * len(cells), "wrong": wrong}
    if args.save:
        save(args.save, {**totals, "cells": cells})
    print(json.dumps(totals))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
