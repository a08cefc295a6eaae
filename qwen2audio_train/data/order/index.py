"""The index of a source: where each example stands in its manifest and how long it is. Planning opens no audio.

An index is a folder in the cache, named by a hash of all that it depends on: `records.bin` (28 bytes an example, memory
mapped: 100 million examples are 2.8 GB of page cache, of which a planner maps 8 MB at a time), `index.json`, and
`bad.jsonl`, the lines that are no example. It is built in parts by several processes; a build that was interrupted goes
on with the parts that it has.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Example, clips_of
from qwen2audio_train.data.manifests.cache import Manifest
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.quarantine import BadExample, costing_one_example, count_reasons
from qwen2audio_train.data.storage.files import content_hash, locked, remembered, text_hash
from qwen2audio_train.data.storage.parallel import in_order, processes

RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("duration_s", "<f4"),
        ("audio_tokens", "<u4"),
        ("text_tokens", "<u4"),
        ("file", "<u2"),
        ("task", "<u2"),
    ]
)
"""Bytes [offset, offset + length) of manifest number `file`, seconds of audio, tokens, number of the task."""

VERSION = 4
"""Of the files; another one is built again."""

COUNTS_VERSION = 2
"""Of what is counted. States of the data are bound to it: a newer one ends every run that could be resumed."""
MOST_FILES = 2**16
PART_BYTES = 4 * 2**20
"""What one process reads at a time, and at most what it does again after an interruption: some 20 000 lines."""


@dataclass(frozen=True)
class Measured:
    """What the planner knows of an example; text tokens are all that are no audio, branches included."""

    duration_s: float
    audio_tokens: int
    text_tokens: int
    task: str


Measure = Callable[[Example], Measured]


@dataclass(frozen=True)
class Index:
    """An index that lies in `folder`; it pickles as its path and is mapped anew wherever it is used.

    `content` is a hash of the manifests, `fingerprint` of them and of all that the counts depend on.
    """

    folder: Path
    files: tuple[Manifest, ...]
    task_counts: dict[str, int]
    file_counts: tuple[int, ...]
    content: str
    fingerprint: str

    @cached_property
    def records(self) -> NDArray[np.void]:
        """(n,) RECORD, memory mapped."""
        path = self.folder / "records.bin"
        if not path.stat().st_size:
            return np.empty(0, RECORD)
        records = np.memmap(path, RECORD, mode="r")
        _advise(records, mmap.MADV_RANDOM)  # else every record brings 64 KiB of neighbours along
        return records

    def __len__(self) -> int:
        return len(self.records)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key not in ("records", "by_length")}

    def read(self, number: int) -> Example:
        """Example `number`, in one read. Raises ManifestError or OSError when the manifest is no longer what it was."""
        record = self.records[number]
        manifest = self.files[record["file"]]
        offset = int(record["offset"])
        with open(manifest.path, "rb") as file:
            line = os.pread(file.fileno(), int(record["length"]), offset)
            try:
                return manifest.example(line, 0)
            except ManifestError as error:  # rare: so the line is looked for only now
                number = 1 + sum(block.count(b"\n") for block in _blocks(file, offset))
                raise ManifestError(error.file, number, error.field, error.expected, error.found) from None

    @property
    def is_remote(self) -> bool:
        """Whether the audio lies in shards that have to be fetched."""
        return any("://" in file.place for file in self.files)

    def bad(self) -> list[BadExample]:
        """The lines that are no example, with the reason."""
        with (self.folder / "bad.jsonl").open(encoding="utf-8") as lines:
            return [BadExample(**json.loads(line)) for line in lines]

    @cached_property
    def by_length(self) -> NDArray[np.uint32]:
        """(n,) numbers of the examples from short to long, where a length varies by a fixed tenth up or down."""
        path = self.folder / "by_length.npy"
        if not path.exists():
            jitter = np.random.default_rng(0).uniform(0.9, 1.1, len(self)).astype(np.float32)
            order = np.argsort(self.records["duration_s"] * jitter, kind="stable").astype(np.uint32)
            partial_path = path.with_suffix(f".{os.getpid()}.npy")
            np.save(partial_path, order)
            os.replace(partial_path, path)
        return np.load(path, mmap_mode="r")


def why_empty(index: Index) -> str:
    """Why an index holds no example."""
    if bad := index.bad():
        reasons = count_reasons(item.reason for item in bad)
        return f"none of {len(bad)} rows is an example: {reasons}; the first is {bad[0].example}"
    return "there are no rows in it (a line of names alone, or nothing)"


def release(records: NDArray[np.void]) -> None:
    """Unmap the pages that were read: they stay in the page cache, but no longer count as memory of this process."""
    _advise(records, mmap.MADV_DONTNEED)


def _advise(records: NDArray[np.void], advice: int) -> None:
    if isinstance(records.base, mmap.mmap):
        records.base.madvise(advice)


def open_index(
    files: Sequence[Manifest], measure: Measure, measure_key: str, cache_dir: str | Path, num_workers: int = 0
) -> Index:
    """The index of the manifests `files`, built if the cache lacks it.

    Args:
        measure: counts an example's tokens; picklable when num_workers > 0.
        measure_key: names everything that `measure` depends on (tokenizer, prompts): a change makes another index.

    Raises:
        FileNotFoundError: a manifest does not exist.
        ConfigError: more files than an index can tell apart.
    """
    if len(files) > MOST_FILES:
        raise ConfigError(f"{len(files)} files in one source; {MOST_FILES} are the most: put some of them together")
    content = text_hash(*(remembered(file.path, cache_dir, "content", content_hash) for file in files))
    fingerprint = text_hash(str(COUNTS_VERSION), measure_key, content)
    folder = Path(cache_dir) / "index" / f"{fingerprint}-{VERSION}"
    places = text_hash(*(os.path.abspath(file.place) if "://" not in file.place else file.place for file in files))
    head = _opened(folder, files, measure, num_workers, places)
    if head.get("places") not in (None, places):
        folder = folder.with_name(f"{folder.name}-{places}")
        head = _opened(folder, files, measure, num_workers, places)
    return Index(folder, tuple(files), head["task_counts"], tuple(head["file_counts"]), content, fingerprint)


def _opened(folder: Path, files: Sequence[Manifest], measure: Measure, num_workers: int, places: str) -> dict[str, Any]:
    """What an index says of itself, which is built if it is not there."""
    if not (folder / "index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock"):
            if not (folder / "index.json").exists():
                _build(folder, files, measure, num_workers, places)
    return dict(json.loads((folder / "index.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class _Part:
    """The lines of manifest `file` (number `number`) that start in the bytes [start, stop); the first of them is line
    `first_line`."""

    file: Manifest
    number: int
    start: int
    stop: int
    first_line: int


def _build(folder: Path, files: Sequence[Manifest], measure: Measure, num_workers: int, places: str) -> None:
    parts = [part for number, file in enumerate(files) for part in _parts(file, number)]
    jobs = [(part, folder / f"part-{number:06d}.json") for number, part in enumerate(parts)]
    todo = [job for job in jobs if not job[1].exists()]
    build_part = partial(_build_part, measure)
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="index", disable=None) as bar:
        if num_workers > 0 and len(todo) > 1:
            with processes(num_workers) as pool:
                for _ in in_order(pool, build_part, todo, ahead=4 * num_workers):
                    bar.update()
        else:
            for job in todo:
                build_part(job)
                bar.update()
    _join_parts(folder, [path for _, path in jobs], parts, len(files), places)


def _parts(manifest: Manifest, number: int) -> Iterator[_Part]:
    size = os.path.getsize(manifest.path)
    lines_before = 0
    with open(manifest.path, "rb") as file:
        for start in range(0, size, PART_BYTES):
            if start:
                lines_before += file.read(PART_BYTES - (start == PART_BYTES)).count(b"\n")
            # a part begins after the first line end from the byte before it on
            first_line = lines_before + 2 if start else 1
            yield _Part(manifest, number, start, min(start + PART_BYTES, size), first_line)


def _blocks(file: IO[bytes], size: int) -> Iterator[bytes]:
    """The first `size` bytes of a file."""
    file.seek(0)
    while size > 0 and (block := file.read(min(size, PART_BYTES))):
        size -= len(block)
        yield block


def _build_part(measure: Measure, job: tuple[_Part, Path]) -> None:
    part, path = job
    rows: list[tuple[float, ...]] = []
    tasks: dict[str, int] = {}
    bad: list[BadExample] = []
    opened_audio = False
    for line, (offset, raw) in enumerate(_lines(part), start=part.first_line):
        if not raw.strip():
            continue
        with costing_one_example(bad, f"{part.file.place}:{line}", line=line):
            example = part.file.example(raw, line)
            opened_audio |= any(clip.duration_s is None for clip in clips_of(example))
            m = measure(example)
            task = tasks.setdefault(m.task, len(tasks))
            rows.append((offset, len(raw), m.duration_s, m.audio_tokens, m.text_tokens, part.number, task))
    np.array(rows, RECORD).tofile(path.with_suffix(".bin"))
    head = {"tasks": list(tasks), "opened_audio": opened_audio, "bad": [asdict(b) for b in bad]}
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(head), encoding="utf-8")
    os.replace(partial_path, path)


def _lines(part: _Part) -> Iterator[tuple[int, bytes]]:
    with open(part.file.path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        offset = file.tell()
        while offset < part.stop and (raw := file.readline()):
            yield offset, raw
            offset += len(raw)


def _join_parts(folder: Path, paths: list[Path], parts: list[_Part], num_files: int, places: str) -> None:
    """One file out of the parts, with one list of tasks.

    Where lengths were read from audio, or there are bad lines, the index holds for manifests at these places alone: the
    same lines elsewhere may speak of other files.
    """
    is_bound = False
    tasks: dict[str, int] = {}
    counts: dict[str, int] = {}
    file_counts = [0] * num_files
    with (folder / "records.bin").open("wb") as out, (folder / "bad.jsonl").open("w", encoding="utf-8") as bad_file:
        for path, part in zip(paths, parts, strict=True):
            head = json.loads(path.read_text(encoding="utf-8"))
            rows = np.fromfile(path.with_suffix(".bin"), RECORD)
            numbers = np.array([tasks.setdefault(task, len(tasks)) for task in head["tasks"]] or [0], dtype="<u2")
            for task, count in zip(head["tasks"], np.bincount(rows["task"]).tolist(), strict=True):
                counts[task] = counts.get(task, 0) + count
            rows["task"] = numbers[rows["task"]]
            file_counts[part.number] += len(rows)
            is_bound |= head["opened_audio"] or bool(head["bad"])
            out.write(rows.tobytes())
            bad_file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in head["bad"])
    head = {"task_counts": counts, "file_counts": file_counts, "places": places if is_bound else None}
    partial_path = folder / "index.partial"
    partial_path.write_text(json.dumps(head), encoding="utf-8")
    os.replace(partial_path, folder / "index.json")
    for path in folder.glob("part-*"):
        path.unlink()
