"""A corpus in any form that a reader knows into one manifest: a mapping says which column is which field."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen2audio_train.config_data import SourceConfig, SourceFormat
from qwen2audio_train.data.audio import AudioError, probe
from qwen2audio_train.data.corpus import Corpus, open_corpus
from qwen2audio_train.data.examples import Example, TaskExample
from qwen2audio_train.data.files import write_whole
from qwen2audio_train.data.manifest import parse_line, to_record
from qwen2audio_train.data.mapping import check_columns, columns_of, reach
from qwen2audio_train.data.readers import Row
from qwen2audio_train.data.record import ManifestError
from qwen2audio_train.data.remote import Remote


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


@dataclass(frozen=True)
class Converted:
    """Number of examples written, and what is wrong with the rows that were not."""

    written: int
    errors: list[ManifestError | AudioError]


def convert(options: ConvertOptions) -> Converted:
    """Write the manifest of a corpus; a missing duration is read from the file's header.

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
    lines: list[str] = []
    errors: list[ManifestError | AudioError] = []
    first_row: dict[str, int] = {}
    columns: set[str] = set()
    for place, number, row in _rows(corpus):
        try:
            if isinstance(row, ManifestError):
                raise row
            columns |= columns_of(row)
            if any(str(reach(row, column)) != value for column, value in options.where.items()):
                continue
            example = _example(corpus.record(row), place, number, options.audio_dir)
            first = first_row.setdefault(example.id, number)
            if first != number:
                raise ManifestError(place, number, "id", "an id of its own", f'"{example.id}", as in line {first}')
            lines.append(json.dumps(to_record(example, target.parent), ensure_ascii=False) + "\n")
        except (ManifestError, AudioError) as error:
            errors.append(error)
    asked = {f"columns.{name}": column for name, column in options.columns.items()}
    asked |= {f"where.{column}": column for column in options.where}
    check_columns(asked, columns, options.input)
    if errors and not options.skip_bad:
        return Converted(0, errors)
    write_whole(target, lines)
    return Converted(len(lines), errors)


def _rows(corpus: Corpus) -> Iterator[tuple[str, int, Row | ManifestError]]:
    for shard in range(corpus.num_shards):
        for number, row in corpus.rows(shard):
            yield corpus.place(shard), number, row


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
