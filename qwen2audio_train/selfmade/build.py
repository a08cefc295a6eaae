"""Build the corpus: plan, render in a pool of processes, write manifests, and move the whole into place at once."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import multiprocessing
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from qwen2audio_train.errors import UserError
from qwen2audio_train.selfmade import piper
from qwen2audio_train.selfmade.dialogues import (
    chat_lines,
    command_lines,
    preference_lines,
    quiet_lines,
    text_lines,
)
from qwen2audio_train.selfmade.pieces import Piece, write_piece
from qwen2audio_train.selfmade.speech import check_installed
from qwen2audio_train.selfmade.tasks import Line, Pools, task_lines, words_of
from qwen2audio_train.selfmade.utterances import VARIANTS, Planner, Variant

Progress = Callable[[int, int], None]
SPLITS = ("train", "dev")
_CARD = "corpus.json"
ASKED = 80
"""Dialogues, and transcriptions, to which a model's own answers are sampled for preference pairs."""


def build(
    out_dir: str | Path,
    variant: str = "demo",
    seed: int = 0,
    num_workers: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the corpus below `out_dir`, or return at once where the same one is there already.

    Audio goes to audio/, 16 kHz mono WAV. Manifests: pretrain.<source>.train.jsonl, one per source so that a recipe can
    weigh them, pretrain.dev.jsonl, {sft,dpo}.{train,dev}.jsonl and commands.dev.jsonl. The result depends on (variant,
    seed) and this package's files alone. A build that is cut short leaves nothing behind under `out_dir`.

    Args:
        variant: `small` (for tests, seconds), `demo` or `full` (six languages, 1 000 English words).
        num_workers: processes; 0 or 1 renders in this one.
        progress: called with (pieces done, pieces in all).

    Returns:
        What corpus.json holds: variant, seed, version, counts, hours, vocabulary.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r} of the self-made corpus; expected one of {', '.join(VARIANTS)}")
    check_installed()
    out = Path(out_dir)
    neural = VARIANTS[variant].piper > 0 and piper.is_installed()
    key = {"variant": variant, "seed": seed, "version": _version(), "piper": neural}
    if (card := _card_of(out)) is not None and card.items() >= key.items():
        return card
    if out.exists() and card is None and any(out.iterdir()):
        raise FileExistsError(
            f"{out} is not empty and holds no {_CARD}; choose another folder for the self-made corpus"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        card = key | _fill(folder, VARIANTS[variant], seed, num_workers, progress)
        (folder / _CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return card


def _card_of(folder: Path) -> dict[str, Any] | None:
    path = folder / _CARD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _version() -> str:
    """Hash of everything that the result depends on: the sources and data of this package, and espeak-ng."""
    digest = hashlib.sha256(importlib.metadata.version("espeakng-loader").encode())
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.glob("grammar/*.yaml"), *folder.glob("texts/*")]):
        if path.is_dir():
            continue
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _fill(folder: Path, variant: Variant, seed: int, num_workers: int, progress: Progress | None) -> dict[str, Any]:
    """Write audio and manifests; returns counts."""
    plan = {split: _plan(variant, seed, split) for split in SPLITS}
    pieces = [piece for split in SPLITS for pool in plan[split].values() for piece in pool]
    durations = _render(pieces, folder, seed, num_workers, progress)
    vocabulary = {
        split: {
            language: frozenset(
                word
                for piece in plan[split]["speech"]
                if piece.language == language
                for word in words_of(piece.text, language)
            )
            for language in variant.languages
        }
        for split in SPLITS
    }
    pools = {
        "train": Pools(plan["train"], durations),
        "dev": Pools(plan["dev"], durations, vocabulary["train"]),
    }
    manifests = _manifests(pools, variant, seed)
    for name, lines in manifests.items():
        _write_lines(folder / name, lines)
    return _summary(plan, durations, vocabulary, manifests)


def _plan(variant: Variant, seed: int, split: str) -> dict[str, list[Piece]]:
    """Pieces of a split by kind."""
    planner = Planner(variant, seed)
    speech = [piece for language in variant.languages for piece in planner.speech(split, language)]
    talk = [piece for piece in speech if piece.origin == "sentence"]
    plan: dict[str, list[Piece]] = {"speech": speech, "command": planner.commands(split, talk)}
    for piece in planner.others(split):
        plan.setdefault(piece.kind, []).append(piece)
    return plan


def _manifests(pools: dict[str, Pools], variant: Variant, seed: int) -> dict[str, list[Line]]:
    train, dev = pools["train"], pools["dev"]
    counts = {"train": variant.sounds, "dev": variant.held_out_other}
    dialogues = {"train": variant.dialogues, "dev": min(variant.dialogues, 150)}
    manifests: dict[str, list[Line]] = {}
    for split in SPLITS:
        pool = pools[split]
        for line in task_lines(pool, variant.languages, counts[split], seed, split):
            name = "pretrain.dev.jsonl" if split == "dev" else f"pretrain.{line['source']}.train.jsonl"
            manifests.setdefault(name, []).append(line)
        size = dialogues[split]
        manifests[f"sft.{split}.jsonl"] = chat_lines(pool, size, size, split == "train", seed, split)
        if variant.quiet:
            manifests[f"sft.{split}.jsonl"] += quiet_lines(pool)
        if variant.texts:
            manifests[f"text.{split}.jsonl"] = text_lines(pool)
    if variant.texts:
        asked = manifests["sft.train.jsonl"], manifests["pretrain.asr_en.train.jsonl"]
        manifests["questions.train.jsonl"] = [line for lines in asked for line in _evenly(lines, ASKED)]
    manifests["commands.dev.jsonl"] = command_lines(dev)
    manifests["dpo.train.jsonl"] = preference_lines(train, variant.pairs, seed, "train")
    manifests["dpo.dev.jsonl"] = preference_lines(dev, min(variant.pairs, 150), seed, "dev")
    return manifests


def _evenly(lines: list[Line], count: int) -> list[Line]:
    """`count` of the lines, from all of them."""
    return [lines[place * len(lines) // count] for place in range(min(count, len(lines)))]


def _render(
    pieces: Sequence[Piece], folder: Path, seed: int, num_workers: int, progress: Progress | None
) -> dict[str, float]:
    """Write every piece's file; durations in seconds by id."""
    work = partial(write_piece, folder=folder, seed=seed)
    if num_workers <= 1:
        return _collect(pieces, map(work, pieces), progress)
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return _collect(pieces, pool.map(work, pieces, chunksize=32), progress)


def _collect(pieces: Sequence[Piece], results: Iterable[float], progress: Progress | None) -> dict[str, float]:
    durations = {}
    for done, (piece, duration_s) in enumerate(zip(pieces, results, strict=True), start=1):
        durations[piece.id] = duration_s
        if progress is not None:
            progress(done, len(pieces))
    return durations


def _write_lines(path: Path, lines: Iterable[Line]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _summary(
    plan: Any, durations: dict[str, float], vocabulary: Any, manifests: dict[str, list[Line]]
) -> dict[str, Any]:
    hours = {
        split: {kind: round(sum(durations[piece.id] for piece in pool) / 3600, 4) for kind, pool in plan[split].items()}
        for split in SPLITS
    }
    return {
        "lines": {name: len(lines) for name, lines in manifests.items()},
        "sources": {name: dict(Counter(line["source"] for line in lines)) for name, lines in manifests.items()},
        "hours": hours,
        "words": {split: {language: len(words) for language, words in vocabulary[split].items()} for split in SPLITS},
        "unseen_words": {
            language: sorted(vocabulary["dev"][language] - vocabulary["train"][language])
            for language in vocabulary["dev"]
        },
    }
