"""A corpus in any form that a reader knows into one manifest: a mapping says which column is which field."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen2audio_train.config.bounds import nearest, processors
from qwen2audio_train.config.data import SampleRecipe, SourceConfig, SourceFormat
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.audio.decode import clip_duration
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.examples import Clip, Example, clips_of, with_clips
from qwen2audio_train.data.manifests.cache import stamp_of
from qwen2audio_train.data.manifests.columns import as_text, check_columns, columns_of, reach
from qwen2audio_train.data.manifests.corpus import Corpus, open_corpus
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.manifest import parse_record
from qwen2audio_train.data.manifests.record import to_record
from qwen2audio_train.data.manifests.tables import Row
from qwen2audio_train.data.quarantine import count_reasons
from qwen2audio_train.data.samples.recipe import limits_of, remote_of
from qwen2audio_train.data.samples.sample import DURATION_TOLERANCE_S
from qwen2audio_train.data.storage.files import text_hash, write_whole
from qwen2audio_train.data.storage.parallel import in_order, processes
from qwen2audio_train.data.storage.remote import Remote

ROWS_PER_JOB = 256
MOST_VALUES = 1000
"""Values of a column of `where` that are remembered."""


@dataclass
class ConvertOptions:
    """The keys of `launch/data.py convert`.

    Attributes:
        input: the corpus: a table (JSON, CSV, TSV), conversations, tars, a Kaldi folder, lhotse cuts, a Hugging Face
            data set, a folder of audio; several files by braces and globs. Audio paths in it are relative to its
            folder, or to `audio_dir`.
        output: the manifest to write; audio paths in it are relative to its folder.
        columns: our field -> the corpus's column; `labels.emotion` reaches into an object.
        constants: fields that are the same for every row, such as {task: asr, language: en}.
        where: column -> value; only rows that have it are taken.
        audio_dir: folder of the audio files.
        format: the form, where its looks do not tell.
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
    num_workers: int = processors()


@dataclass
class Seen:
    """What the rows hold: all columns, and how often each value of a column of `where` comes."""

    columns: set[str] = field(default_factory=set)
    values: dict[str, Counter[str]] = field(default_factory=dict)
    num_rows: int = 0

    def add(self, row: Row | ManifestError, where: dict[str, str]) -> None:
        self.num_rows += 1
        if isinstance(row, ManifestError):
            return
        self.columns |= columns_of(row)
        for column in where:
            counter = self.values.setdefault(column, Counter())
            value = as_text(reach(row, column))
            if value in counter or len(counter) < MOST_VALUES:
                counter[value] += 1


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
        ConfigError: a column that no row has, an unknown form, a corpus of which no row becomes an example.
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
    corpus = open_corpus(target.stem, source, Remote(), where="input")
    corpus = replace(corpus, recordings=str(target.with_suffix(".audio")))
    notes = target.with_name(f".{target.name}.part")
    seen = Seen()
    _note_all(corpus, options, notes, seen)
    asked = {f"columns.{name}": column for name, column in options.columns.items()}
    asked |= {f"where.{column}": column for column in options.where}
    try:
        check_columns(asked, seen.columns, options.input)
        errors = [outcome for outcome in _noted(notes) if isinstance(outcome, str)]
        if errors and not options.skip_bad:
            return Converted(0, errors)
        written = sum(isinstance(outcome, dict) for outcome in _noted(notes))
        if not written:
            raise ConfigError(f"{options.input}: nothing was written: {_why_nothing(seen, options.where, errors)}")
        records = (outcome for outcome in _noted(notes) if isinstance(outcome, dict))
        write_whole(target, (json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return Converted(written, errors)
    finally:
        notes.unlink()


def _why_nothing(seen: Seen, where: dict[str, str], errors: list[str]) -> str:
    """Why no row became an example."""
    if not seen.num_rows:
        return "it holds no rows (a line of names alone, or nothing)"
    reasons = []
    for column, value in where.items():
        found = seen.values.get(column, Counter())
        if value not in found:
            known = ", ".join(f"{name!r} ({count})" for name, count in found.most_common(5))
            hint = nearest(value, map(repr, found)) if len(found) > 5 else ""
            reasons.append(f"no row has where.{column}={value}; the column has {known}; {hint}".rstrip("; "))
    if errors:
        reasons.append(f"{len(errors)} bad rows: {count_reasons(errors)}")
    return " and ".join(reasons) or "no row has all the values of where at once"


def _note_all(corpus: Corpus, options: ConvertOptions, notes: Path, seen: Seen) -> None:
    """Note what becomes of every row, after what is noted already; what the rows hold is added to `seen`."""
    done = _resume(notes, _made_of(corpus, options))
    jobs = _jobs(corpus, done, seen, options.where)
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
    return text_hash(str(given), *(stamp_of(path) for path in corpus.files))


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


def _jobs(corpus: Corpus, done: int, seen: Seen, where: dict[str, str]) -> Iterator[Rows]:
    """The rows after the first `done`, some at a time."""
    rows: Rows = []
    for shard in range(corpus.num_shards):
        for number, row in corpus.rows(shard):
            seen.add(row, where)
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
    return "".join(json.dumps(line) + "\n" for line in lines)


def _outcome(corpus: Corpus, options: ConvertOptions, place: str, number: int, row: Row | ManifestError) -> Outcome:
    if isinstance(row, ManifestError):
        return str(row)
    if any(as_text(reach(row, column)) != value for column, value in options.where.items()):
        return None
    try:
        return to_record(_example(corpus, row, place, number, options.audio_dir), Path(options.output).parent)
    except ManifestError as error:
        return str(error)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        return f"{place}:{number}: {error}"


def _noted(notes: Path) -> Iterator[Outcome]:
    """What the rows become, an id that stood before being an error."""
    first_row: dict[str, tuple[str, int]] = {}
    with notes.open(encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            place, number, outcome = json.loads(line)
            place = sys.intern(place)  # one path for all of its rows
            if isinstance(outcome, dict):
                first = first_row.setdefault(outcome["id"], (place, number))
                if first != (place, number):
                    there = f"line {first[1]}" if first[0] == place else f"line {first[1]} of {first[0]}"
                    is_of_tars = first[0] != place and place.endswith(".tar")
                    hint = "; columns.id=__path__ puts the tar's name before a key" if is_of_tars else ""
                    found = f'"{outcome["id"]}", as in {there}{hint}'
                    outcome = str(ManifestError(place, number, "id", "an id of its own", found))
            yield outcome


def _example(corpus: Corpus, row: Row, place: str, number: int, audio_dir: str | None) -> Example:
    """The example of a row, with the length of every clip. Raises ManifestError, AudioError."""
    record = corpus.record(row, place, number)
    folder = audio_dir if audio_dir is None or "://" in audio_dir else os.path.abspath(audio_dir)
    beside = place if folder is None else os.path.join(folder, os.path.basename(place))
    try:
        example = parse_record(record, beside, number)
    except ManifestError as error:
        raise ManifestError(place, error.line, error.field, error.expected, error.found) from None
    return with_clips(example, [_measured(clip) for clip in clips_of(example)])


def _measured(clip: Clip) -> Clip:
    """The clip with its length, and inside of its file: whatever `check` and training would refuse is refused here.

    Whole files whose length is given are not opened: that costs a tenth of a millisecond each, and `check` does it.
    """
    if clip.duration_s is not None and clip.start_s == 0 and clip.end_s is None:
        return clip
    recipe = SampleRecipe()
    seconds = clip_duration(clip, None, limits_of(recipe), remote_of(recipe))
    given = clip.duration_s
    if given is None:
        return replace(clip, duration_s=round(seconds, 4))
    if abs(given - seconds) > max(DURATION_TOLERANCE_S, 0.02 * given):
        found = f"lasts {seconds:.3f} s from {clip.start_s:g} s on, and duration_s says {given:g}"
        raise AudioError(clip.path, f"{found}; give end_s, where the slice ends before the file does")
    return clip
