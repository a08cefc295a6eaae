"""What decoding tells about clips, for many of them, noted on the way so that a run that is broken off goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.examples import Clip, Example
from qwen2audio_train.data.samples.sample import load_clip
from qwen2audio_train.data.storage.blobs import container
from qwen2audio_train.data.storage.files import text_hash
from qwen2audio_train.data.storage.parallel import in_order
from qwen2audio_train.layout import SAMPLING_RATE

BLOCK = 2**20
"""Samples that are measured at a time."""


@dataclass(frozen=True)
class ClipFacts:
    """What decoding tells about a clip; `content` is a hash of its samples at 16 bits, the same for lossless copies."""

    duration_s: float
    peak_dbfs: float
    clipped_share: float
    content: str


class Placed(NamedTuple):
    """A clip, the example that it belongs to, and where that stands."""

    line: int
    example: Example
    clip: Clip
    file: str = ""


def examine(clip: Clip, recipe: SampleRecipe = SampleRecipe()) -> ClipFacts | AudioError:
    """Decode a clip as training will, and measure it; an error is returned, not raised."""
    try:
        waveform = load_clip(clip, recipe)
    except AudioError as error:
        return error
    peak, clipped, content = 1e-10, 0, hashlib.blake2b(digest_size=16)
    for start in range(0, len(waveform), BLOCK):  # so that half an hour needs no more than itself
        block = waveform[start : start + BLOCK]
        level = np.abs(block)
        peak = max(peak, float(level.max()))
        clipped += int((level >= 0.999).sum())
        content.update(np.round(block * 32_767).astype("<i4").tobytes())
    return ClipFacts(
        duration_s=len(waveform) / SAMPLING_RATE,
        peak_dbfs=float(20 * np.log10(peak)),
        clipped_share=clipped / len(waveform),
        content=content.hexdigest(),
    )


def examine_all(
    clips: Iterable[Placed], notes: Path, num_workers: int, recipe: SampleRecipe = SampleRecipe()
) -> Iterator[tuple[Placed, ClipFacts | AudioError]]:
    """The clips in order with their facts, worked out in threads (decoding and hashing let go of the interpreter).

    Args:
        notes: file that the facts are noted in; those of a run that was broken off are taken from there, as long as
            neither the order of the clips nor their files have changed since.
    """
    notes.parent.mkdir(parents=True, exist_ok=True)
    rest = iter(clips)
    with notes.open("a+b") as file:
        file.seek(0)
        for placed in rest:
            place = file.tell()
            found = _noted(file.readline(), placed.clip)
            if found is None:
                file.truncate(place)
                rest = chain([placed], rest)
                break
            yield placed, found
        workers = max(1, num_workers)
        with ThreadPoolExecutor(workers) as pool:
            for placed, facts in in_order(pool, lambda item: examine(item.clip, recipe), rest, ahead=4 * workers):
                file.write(_note(placed.clip, facts))
                yield placed, facts


def _note(clip: Clip, facts: ClipFacts | AudioError) -> bytes:
    told = asdict(facts) if isinstance(facts, ClipFacts) else [facts.path, facts.reason]
    return json.dumps([_key(clip), told]).encode() + b"\n"


def _noted(line: bytes, clip: Clip) -> ClipFacts | AudioError | None:
    """The facts that a line notes, None if it is cut off or about another clip."""
    if not line.endswith(b"\n"):
        return None
    key, told = json.loads(line)
    if key != _key(clip):
        return None
    return ClipFacts(**told) if isinstance(told, dict) else AudioError(*told)


def _key(clip: Clip) -> str:
    """Names a clip and the state of its file."""
    try:
        status = os.stat(container(clip.path))
        state = f"{status.st_size}/{status.st_mtime_ns}"
    except OSError:
        state = ""
    return text_hash(*map(str, astuple(clip)), state)
