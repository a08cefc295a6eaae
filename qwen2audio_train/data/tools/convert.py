"""A corpus in any form that a reader knows into one manifest: a mapping says which column is which field."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen2audio_train.config.data import SourceConfig, SourceFormat
from qwen2audio_train.data.audio.decode import AudioError, probe
from qwen2audio_train.data.examples import Example, TaskExample
from qwen2audio_train.data.manifests.columns import check_columns, columns_of, reach
from qwen2audio_train.data.manifests.corpus import Corpus, open_corpus
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.manifest import parse_line, to_record
from qwen2audio_train.data.manifests.readers import Row
from qwen2audio_train.data.storage.files import text_hash, write_whole
from qwen2audio_train.data.storage.parallel import in_order, processes
from qwen2audio_train.data.storage.remote import Remote

ROWS_PER_JOB = 256


@dataclass
class ConvertOptions:
    """The keys of `launch/data.py convert`.

    Attributes:
        input: the corpus: a table (JSONL, CSV, TSV), tars, a Kaldi folder, lhotse cuts, a Hugging Face data set. Audio
            paths in it are relative to its folder, or to `audio_dir`.
        output: the manifest to write; audio paths in it are relative to its folder.
        format: the form, where its looks do not tell.
        columns: our field -> the corpus's column; `labels.emotion` reaches into an object.
        constants: fields that are the same for every row, such as {task: asr, language: en}.
        where: column -> value; only rows that have it are taken.
        audio_dir: folder of the audio files.
        split, subset, revision: of a Hugging Face data set.
        skip_bad: leave bad rows out; else nothing is written while there are any.
        num_workers: processes.
    """

    input: str = "???"
    output: str = "???"
    columns: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    audio_dir: str | None = None
    format: SourceFormat = SourceFormat.auto
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    skip_bad: bool = False
    num_workers: int = os.cpu_count() or 1


@dataclass(frozen=True)
class Converted:
    """Number of examples written, and what is wrong with the rows that were not."""

    written: int
    errors: list[str]


Rows = list[tuple[str, int, Row | ManifestError]]
"""Rows with their places and numbers."""

Outcome = dict[str, Any] | str | None
"""What a row becomes: a record of ours, what is wrong with it, or nothing where `where` does not want it."""


def convert(options: ConvertOptions) -> Converted:
    """Write the manifest of a corpus; a missing duration is read from the file's header.

    What the rows become is noted beside the output until all of it is there: a run that was broken off goes on where
    it stopped, unless the input or the options have changed.

    Raises:
        ConfigError: a column that no row has, an unknown form.
    """
    target = Path(options.output)
    source = SourceConfig(
        [options.input],
        format=options.format,
        columns=options.columns,
        constants=options.constants,
        split=options.split,
        subset=options.subset,
        revision=options.revision,
    )
    corpus = open_corpus(target.stem, source, Remote(), key="")
    notes = target.with_name(f".{target.name}.part")
    columns: set[str] = set()
    _note_all(corpus, options, notes, columns)
    asked = {f"columns.{name}": column for name, column in options.columns.items()}
    asked |= {f"where.{column}": column for column in options.where}
    try:
        check_columns(asked, columns, options.input)
        errors = [outcome for outcome in _noted(notes) if isinstance(outcome, str)]
        if errors and not options.skip_bad:
            return Converted(0, errors)
        records = (outcome for outcome in _noted(notes) if isinstance(outcome, dict))
        write_whole(target, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return Converted(sum(isinstance(outcome, dict) for outcome in _noted(notes)), errors)
    finally:
        notes.unlink()


def _note_all(corpus: Corpus, options: ConvertOptions, notes: Path, columns: set[str]) -> None:
    """Note what becomes of every row, behind what is noted already; the rows' columns are added to `columns`."""
    done = _resume(notes, _made_of(corpus, options))
    jobs = _jobs(corpus, done, columns)
    work = partial(_outcomes, replace(corpus, files=(), hub=None), options)
    first = list(islice(jobs, 2))
    jobs = chain(first, jobs)
    with notes.open("a", encoding="utf-8") as file, tqdm(initial=done, desc="rows", unit="", disable=None) as bar:

        def note(outcomes: str, number: int) -> None:
            file.write(outcomes)
            file.flush()
            bar.update(number)

        if len(first) < 2 or options.num_workers < 2:
            for rows in jobs:
                note(work(rows), len(rows))
        else:
            with processes(options.num_workers) as pool:
                for rows, outcomes in in_order(pool, work, jobs, ahead=4 * options.num_workers):
                    note(outcomes, len(rows))


def _made_of(corpus: Corpus, options: ConvertOptions) -> str:
    """Names all that the outcomes depend on."""
    given = {key: str(value) for key, value in vars(options).items() if key not in ("skip_bad", "num_workers")}
    states = [os.stat(path) if os.path.exists(path) else None for path in corpus.files]
    return text_hash(str(given), str([state and (state.st_size, state.st_mtime_ns) for state in states]))


def _resume(notes: Path, made_of: str) -> int:
    """Number of rows that are noted; notes about other things, and half a line, are taken away."""
    notes.parent.mkdir(parents=True, exist_ok=True)
    with notes.open("a+b") as file:
        file.seek(0)
        if file.readline() != made_of.encode() + b"\n":
            file.truncate(0)
            file.write(made_of.encode() + b"\n")
            return 0
        done, end = 0, file.tell()
        for line in file:
            if line.endswith(b"\n"):
                done, end = done + 1, end + len(line)
        file.truncate(end)
    return done


def _jobs(corpus: Corpus, done: int, columns: set[str]) -> Iterator[Rows]:
    """The rows behind the first `done`, some at a time."""
    rows: Rows = []
    for shard in range(corpus.num_shards):
        for number, row in corpus.rows(shard):
            if isinstance(row, dict):
                columns |= columns_of(row)
            if done > 0:
                done -= 1
                continue
            rows.append((corpus.place(shard), number, row))
            if len(rows) == ROWS_PER_JOB:
                yield rows
                rows = []
    if rows:
        yield rows


def _outcomes(corpus: Corpus, options: ConvertOptions, rows: Rows) -> str:
    """A line for every row: its place, its number, and what it becomes."""
    lines = [[place, number, _outcome(corpus, options, place, number, row)] for place, number, row in rows]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _outcome(corpus: Corpus, options: ConvertOptions, place: str, number: int, row: Row | ManifestError) -> Outcome:
    if isinstance(row, ManifestError):
        return str(row)
    if any(str(reach(row, column)) != value for column, value in options.where.items()):
        return None
    try:
        example = _example(corpus.record(row), place, number, options.audio_dir)
    except ManifestError as error:
        return str(error)
    except (AudioError, TypeError) as error:
        return f"{place}:{number}: {error}"
    return to_record(example, Path(options.output).parent)


def _noted(notes: Path) -> Iterator[Outcome]:
    """What the rows become, an id that stood before being an error."""
    first_row: dict[str, int] = {}
    with notes.open(encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            place, number, outcome = json.loads(line)
            if isinstance(outcome, dict):
                first = first_row.setdefault(outcome["id"], number)
                if first != number:
                    found = f'"{outcome["id"]}", as in line {first}'
                    outcome = str(ManifestError(place, number, "id", "an id of its own", found))
            yield outcome


def _example(record: dict[str, Any], place: str, number: int, audio_dir: str | None) -> Example:
    clip = record.get("audio")
    path = clip.get("path") if isinstance(clip, dict) else clip
    if audio_dir is not None and isinstance(path, str) and "://" not in path:
        path = os.path.abspath(os.path.join(audio_dir, path))
        record["audio"] = {**clip, "path": path} if isinstance(clip, dict) else path
    example = parse_line(json.dumps(record), place, number)
    if not isinstance(example, TaskExample) or example.clip.duration_s is not None:
        return example
    duration_s = round(probe(example.clip.path).duration_s - example.clip.start_s, 4)
    return replace(example, clip=replace(example.clip, duration_s=duration_s))
