"""Manifests and their audio into tar shards of a chosen size, shuffled: what streams well from anywhere.

Which example stands where is decided beforehand from the manifests, the seed and the size: so the shards are written
independently of each other, in any order, by any number of processes, the same bytes every time; and a run that was
broken off goes on with the shards that it lacks, once it has cleared away what it left half written.

An example is `<number>.json`, its record, and `<number>.<clip>.<ending>`, the file of each clip. Beside every shard
stands a manifest that names the place of every clip, so that a local reader need not look for it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tarfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from tqdm import tqdm

from qwen2audio_train.config.bounds import processors
from qwen2audio_train.config.data import SampleRecipe
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.audio.decode import clip_duration, load_as_stored, load_audio
from qwen2audio_train.data.examples import Clip, Example, clips_of, with_clips
from qwen2audio_train.data.manifests.corpus import OWN_RECORD
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.order.index import Index, Measured, open_index, why_empty
from qwen2audio_train.data.order.permutation import hash_key, permute
from qwen2audio_train.data.quarantine import BadExample
from qwen2audio_train.data.samples.recipe import limits_of, remote_of
from qwen2audio_train.data.storage.blobs import BLOCK, TarMember
from qwen2audio_train.data.storage.files import json_lines, locked, write_whole
from qwen2audio_train.data.storage.parallel import in_order, processes
from qwen2audio_train.data.tools.sources import open_manifests
from qwen2audio_train.errors import ExampleError
from qwen2audio_train.layout import SAMPLING_RATE

BYTES_PER_S = 18_000
"""Of FLAC at 16 kHz, for the plan alone."""
MOST_FLAC_CHANNELS = 8


@dataclass
class ShardOptions:
    """The keys of `launch/data.py shard`.

    Attributes:
        manifests: what to put into shards.
        output: folder of the shards; a run that was broken off goes on in it.
        name: shards are called <name>-000000.tar.
        shard_mib: size of a shard, about.
        seed: order of the examples.
        audio: `keep` stores files as they are (a slice of a recording as FLAC); `flac` as 16 kHz mono FLAC.
        num_workers: processes.
        cache_dir: where the sizes are noted.
    """

    manifests: list[str] = field(default_factory=list)
    output: str = "???"
    name: str = "shard"
    shard_mib: float = 256.0
    seed: int = 0
    audio: str = "keep"
    num_workers: int = processors()
    cache_dir: str = "data_cache"


@dataclass(frozen=True)
class Sharded:
    """What was written: shards, examples, bytes, and the examples whose audio could not be read."""

    num_shards: int
    num_examples: int
    num_bytes: int
    bad: list[BadExample]


def write_shards(options: ShardOptions) -> Sharded:
    """Put manifests into shards.

    Raises:
        ConfigError: no manifests, a folder that holds other shards, an impossible setting.
        FileNotFoundError: a manifest does not exist.
    """
    if not options.manifests or options.audio not in ("keep", "flac") or options.shard_mib <= 0:
        raise ConfigError("shard: expected manifests=[...], audio=keep or flac, and shard_mib above 0")
    files = [manifest for path in options.manifests for manifest in open_manifests(path, options.cache_dir)]
    index = open_index(files, _measure, f"bytes/{options.audio}", options.cache_dir, options.num_workers)
    if not len(index):
        raise ConfigError(f"manifests: {why_empty(index)}")
    order, edges = plan_shards(index, options)
    output = Path(options.output)
    _claim(output, index, options)
    with locked(output / f"{options.name}.lock"):  # so that what lies half written is nobody's
        for part in output.glob("*.part"):
            if part.name.lstrip(".").startswith(f"{options.name}-"):
                part.unlink()
        return _write_missing(output, index, options, order, edges)


def _write_missing(
    output: Path, index: Index, options: ShardOptions, order: NDArray[np.int64], edges: NDArray[np.int64]
) -> Sharded:
    """The shards that are not there yet."""
    jobs = [(number, order[edges[number] : edges[number + 1]]) for number in range(len(edges) - 1)]
    todo = [job for job in jobs if not (output / f"{options.name}-{job[0]:06d}.tar").exists()]
    write = partial(_write_shard, index, options)
    if options.num_workers > 1:
        with processes(options.num_workers) as pool:
            written = in_order(pool, write, todo, ahead=2 * options.num_workers)
            for _ in tqdm(written, total=len(todo), desc="shards", disable=None):
                pass
    else:
        for job in tqdm(todo, desc="shards", disable=None):
            write(job)
    return _summary(output, options.name, len(jobs), index.bad())


def plan_shards(index: Index, options: ShardOptions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The shuffled order of the examples (n,), and where in it every shard starts (shards + 1,)."""
    order = permute(np.arange(len(index)), len(index), hash_key(options.seed, "shards"))
    behind = np.cumsum(index.records["audio_tokens"][order].astype(np.int64))
    size = int(options.shard_mib * 2**20)
    shard = (behind - 1) // size if len(index) else behind
    starts = np.flatnonzero(np.diff(shard)) + 1
    return order, np.unique([0, *starts.tolist(), len(index)])


def _measure(example: Example) -> Measured:
    """Bytes of an example in a shard, in the place of its audio tokens; about, where audio is written anew."""
    total = 4 * BLOCK
    seconds = 0.0
    for clip in clips_of(example):
        seconds += clip.duration_s or 0.0
        whole = clip.start_s == 0 and clip.end_s is None
        size = os.path.getsize(clip.path) if whole and os.path.isfile(clip.path) else 0
        total += BLOCK + (size or round((clip.duration_s or 10.0) * BYTES_PER_S))
    return Measured(seconds, total, 0, "any")


def _claim(output: Path, index: Index, options: ShardOptions) -> None:
    """Note in the folder what its shards are made of. Raises ConfigError if it holds others."""
    plan = {"content": index.content, "seed": options.seed, "shard_mib": options.shard_mib, "audio": options.audio}
    note = output / f"{options.name}.plan.json"
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != plan:
        raise ConfigError(f"{output}: holds shards of other manifests or settings ({note.name}); take another folder")
    write_whole(note, [json.dumps(plan, indent=1) + "\n"])


def _write_shard(index: Index, options: ShardOptions, job: tuple[int, NDArray[np.int64]]) -> None:
    """Write one shard, its manifest and its list of bad examples; the tar itself appears last."""
    number, rows = job
    target = Path(options.output) / f"{options.name}-{number:06d}.tar"
    part = target.with_suffix(f".{os.getpid()}.part")
    lines: list[str] = []
    bad: list[BadExample] = []
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
        for place, row in enumerate(rows.tolist()):
            name = f"example {row}"
            try:
                example = index.read(row)
                name = example.id
                files = [_encoded(clip, options) for clip in clips_of(example)]
            except (ExampleError, OSError) as error:
                bad.append(BadExample.of(error, name))
                continue
            lines.append(_add_example(archive, target, f"{place:06d}", example, files, options.audio))
    write_whole(target.with_suffix(".jsonl"), lines)
    if bad:
        write_whole(target.with_suffix(".bad.jsonl"), [json.dumps(dataclasses.asdict(item)) + "\n" for item in bad])
    os.replace(part, target)


def _add_example(
    archive: tarfile.TarFile, target: Path, key: str, example: Example, files: list[tuple[str, bytes]], audio: str
) -> str:
    """Append an example to a shard; returns its line for the manifest beside it. FLAC of ours holds one channel."""
    folder = target.parent
    names = [f"{key}.{i}.{suffix}" for i, (suffix, _) in enumerate(files)]
    clips = clips_of(example)
    channels = [None if audio == "flac" else clip.channel for clip in clips]
    inside = [
        Clip(str(folder / name), clip.duration_s, channel=channel)
        for name, clip, channel in zip(names, clips, channels, strict=True)
    ]
    record = {OWN_RECORD: 1, **to_record(with_clips(example, inside), folder)}
    _add(archive, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
    placed = []
    for clip, (_, data) in zip(inside, files, strict=True):
        name = Path(clip.path).name
        member = TarMember(name, _add(archive, name, data), len(data))
        placed.append(dataclasses.replace(clip, path=member.placed(str(target))))
    return json.dumps(to_record(with_clips(example, placed), folder), ensure_ascii=False) + "\n"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file without owner and time; returns where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
    return archive.offset - -(-len(data) // BLOCK) * BLOCK


def _encoded(clip: Clip, options: ShardOptions) -> tuple[str, bytes]:
    """Ending and bytes of a clip's file: as it is, or the slice in a form that loses nothing."""
    recipe = SampleRecipe(cache_dir=options.cache_dir)
    limits, remote = limits_of(recipe), remote_of(recipe)
    if options.audio == "flac":
        return _lossless(load_audio(clip, None, limits, remote), SAMPLING_RATE, "PCM_16")
    if clip.start_s == 0 and clip.end_s is None:
        data = remote.read_clip(clip.path, limits.max_bytes)
        clip_duration(clip, data, limits)  # what is no audio is told here, not by whoever trains on it
        return Path(clip.path).suffix.lstrip(".").lower() or "wav", data or Path(clip.path).read_bytes()
    samples, rate, is_deep = load_as_stored(clip, None, limits, remote)
    return _lossless(samples, rate, "PCM_24" if is_deep else "PCM_16")


def _lossless(samples: NDArray[np.floating], rate: int, subtype: str) -> tuple[str, bytes]:
    """Ending and bytes of a FLAC file; of a WAV of floats where FLAC would clip, or has not so many channels."""
    fits = np.abs(samples).max(initial=0) <= 1 and (samples.ndim == 1 or samples.shape[1] <= MOST_FLAC_CHANNELS)
    ending, subtype = ("flac", subtype) if fits else ("wav", "FLOAT")
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=ending.upper(), subtype=subtype)
    return ending, out.getvalue()


def _summary(output: Path, name: str, num_shards: int, bad: list[BadExample]) -> Sharded:
    tars = [output / f"{name}-{number:06d}.tar" for number in range(num_shards)]
    listed = [*bad]
    for path in tars:
        if path.with_suffix(".bad.jsonl").exists():
            listed += [BadExample(**fields) for fields in json_lines(path.with_suffix(".bad.jsonl"))]
    examples = sum(_count_lines(path.with_suffix(".jsonl")) for path in tars)
    return Sharded(num_shards, examples, sum(path.stat().st_size for path in tars), listed)


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
