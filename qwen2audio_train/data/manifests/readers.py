"""Readers of corpora in other forms than ours: each yields rows, plain dicts with the corpus's own columns.

A row that cannot be read comes as a ManifestError in its place. Paths of audio are relative to the corpus's folder
where the corpus has them so.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qwen2audio_train.data.manifests.json_object import ManifestError, load_record
from qwen2audio_train.data.storage.blobs import BlobError, TarMember, list_members

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | ManifestError]]
"""Rows with their numbers, counted from 1: those of the lines where the corpus has lines."""

AUDIO_SUFFIXES = ("flac", "wav", "ogg", "opus", "mp3", "m4a", "aac", "webm", "mp4")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (".parquet", ".arrow")
"""Endings of the files that the `datasets` library keeps its rows in."""

LARGEST_TEXT = 2**24
"""Bytes of a text or JSON member of a tar."""


def read_kaldi(folder: str) -> Rows:
    """A Kaldi data folder: wav.scp, text, and where they exist segments, utt2dur, utt2spk, utt2lang.

    Columns: id, audio, text, start_s, end_s, duration_s, speaker, language. An utterance without a text is an error.
    """
    place = Path(folder)
    recordings = dict(_pairs(place / "wav.scp"))
    extra = {"duration_s": "utt2dur", "speaker": "utt2spk", "language": "utt2lang"}
    more = {column: dict(_pairs(place / name)) for column, name in extra.items() if (place / name).exists()}
    segments = dict(_pairs(place / "segments")) if (place / "segments").exists() else None
    path = str(place / "text")
    untold = dict.fromkeys(recordings if segments is None else segments)
    number = 0
    for number, (name, text) in enumerate(_pairs(place / "text"), start=1):
        untold.pop(name, None)
        try:
            recording, times = _segment(segments, name, path, number)
            audio = recordings.get(recording, "")
            if not audio or audio.endswith("|") or ".ark:" in audio:
                found = audio or "none"
                raise ManifestError(path, number, "audio", f'a plain file for "{recording}" in wav.scp', found)
            row = {"id": name, "audio": audio, "text": text, **times}
            yield number, row | {column: values[name] for column, values in more.items() if name in values}
        except ManifestError as error:
            yield number, error
    listed = "wav.scp" if segments is None else "segments"
    for line, name in enumerate(untold, start=number + 1):
        yield line, ManifestError(path, line, "", f'a line for "{name}", which stands in {listed}', "none")


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if parts := line.strip().split(maxsplit=1):
                yield parts[0], parts[1] if len(parts) > 1 else ""


def _segment(segments: Mapping[str, str] | None, name: str, path: str, line: int) -> tuple[str, dict[str, float]]:
    """Recording of an utterance, and its times within it."""
    if segments is None:
        return name, {}
    try:
        recording, start, end = segments[name].split()
        times = {"start_s": float(start), "end_s": float(end)}
        return recording, {key: value for key, value in times.items() if value >= 0}  # an end of -1 is the file's
    except (KeyError, ValueError):
        found = segments.get(name, "none")
        raise ManifestError(path, line, "segments", f'"<recording> <start> <end>" for "{name}"', found) from None


def read_lhotse(file: str) -> Rows:
    """A lhotse manifest of cuts (JSONL, also gzipped), one channel of one recording each.

    Columns: id, audio, channel (of a file with several), start_s, end_s, duration_s, text, language, speaker, and the
    cut's `custom` fields. Cuts of several tracks or channels, and recordings that lhotse would change (speed, volume
    and the like), are errors: only what lies in the file can be read.
    """
    for number, row in _read_objects(file):
        try:
            yield number, row if isinstance(row, ManifestError) else _cut(row, file, number)
        except ManifestError as error:
            yield number, error


def _cut(cut: Mapping[str, Any], file: str, line: int) -> Row:
    try:
        recording, channel = cut["recording"], int(cut.get("channel") or 0)
        (source,) = [item for item in recording["sources"] if channel in item["channels"]]
        kind, audio = source["type"], source["source"]
        start, length = float(cut["start"]), float(cut["duration"])
        spoken = cut.get("supervisions") or []
        if kind not in ("file", "url"):
            raise ManifestError(file, line, "recording.sources", "a file or a url", str(kind))
        changes = [item["name"] for item in recording.get("transforms") or [] if item["name"] != "Resample"]
        if changes:
            expected = "none that changes the audio (lhotse's save_audio writes it)"
            raise ManifestError(file, line, "recording.transforms", expected, ", ".join(changes))
        row = {"id": cut["id"], "audio": audio, "start_s": start, "end_s": start + length, "duration_s": length}
        if len(source["channels"]) > 1:
            row["channel"] = source["channels"].index(channel)
        row["text"] = " ".join(item["text"] for item in spoken if item.get("text"))
        row |= {key: spoken[0][key] for key in ("language", "speaker") if spoken and spoken[0].get(key)}
        return row | dict(cut.get("custom") or {})
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        kind = cut.get("type", "no type")
        found = f"{kind} ({type(error).__name__}: {error})"
        raise ManifestError(file, line, "", "a MonoCut of one recording, its channel in one source", found) from None


def read_tar(tar: str, shown: str) -> Rows:
    """A WebDataset shard: neighbouring members with the same name up to the first dot are one row.

    Columns: __key__; audio, the placed path of the first member that is audio; __members__, all of those by name;
    every other member under its ending: `txt` and `cls` as text, `json` as an object.

    Args:
        shown: what the shard is called in paths and errors.
    """
    number = 0
    row: Row = {}
    with open(tar, "rb") as file:
        try:
            for member in list_members(file):
                folder, slash, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")
                key = folder + slash + key
                if row.get("__key__") != key:
                    if row:
                        yield number, row
                    number += 1
                    row = {"__key__": key, "__members__": {}}
                try:
                    _add_member(row, file, member, suffix.lower(), shown, number)
                except ManifestError as error:
                    yield number, error
        except BlobError as error:
            yield number, ManifestError(shown, number, "", "a whole tar file", str(error))
        else:
            yield (number, row) if row else (1, ManifestError(shown, 1, "", "a tar file with files in it", "none"))


def _add_member(row: Row, file: IO[bytes], member: TarMember, suffix: str, shown: str, number: int) -> None:
    kind = suffix.rsplit(".", 1)[-1]
    if kind in AUDIO_SUFFIXES:
        row["__members__"][member.name] = member.placed(shown)
        row.setdefault("audio", member.placed(shown))
    if kind not in ("txt", "json", "cls", "text", "lang"):
        return
    if member.size > LARGEST_TEXT:
        raise ManifestError(shown, number, member.name, f"at most {LARGEST_TEXT} bytes", f"{member.size}")
    file.seek(member.offset)
    data = file.read(member.size)
    if kind == "json":
        row[suffix] = dict(load_record(data, shown, number).values)
        return
    try:
        row[suffix] = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ManifestError(shown, number, member.name, "UTF-8 text", str(error)) from None


def read_arrow(file: str, shown: str, audio: str) -> Rows:
    """An Arrow file as `datasets` writes it; the column `audio` becomes the path of its cell, the others stay.

    Columns: the file's own, class labels by their names, and `__key__`, the row's number.
    """
    import pyarrow as pa  # slow to import, and only Arrow files need it

    number = 0
    try:
        with pa.memory_map(file) as mapped, pa.ipc.open_stream(mapped) as batches:
            info = (batches.schema.metadata or {}).get(b"huggingface", b"{}")
            classes = class_names(json.loads(info).get("info", {}).get("features") or {})
            for batch in batches:
                plain = batch.drop_columns([audio]) if audio in batch.schema.names else batch
                for row in plain.to_pylist():
                    path = f"{shown}::{number}/{audio}"
                    number += 1
                    named = name_classes(row, classes)
                    yield number, {"__key__": f"{Path(shown).stem}/{number - 1}", **named, audio: path}
    except (OSError, ValueError) as error:
        yield number + 1, ManifestError(shown, number + 1, "", "a whole Arrow stream", str(error))


def class_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Column -> names of its classes, from the features of a data set as they are written down."""
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
    }


def name_classes(row: Row, classes: Mapping[str, list[str]]) -> Row:
    """The same row with names in place of the numbers of classes; -1 is no label."""
    numbers = {column: row[column] for column in classes if isinstance(row.get(column), int)}
    return {**row, **{column: classes[column][n] if n >= 0 else None for column, n in numbers.items()}}


def open_lines(file: str) -> IO[bytes]:
    """A text file, gzipped or not, as bytes."""
    return gzip.open(file) if file.endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def read_table(file: str) -> Rows:
    """A table: CSV or TSV with a line of names by the file's ending, else JSONL, gzipped or not; its own columns."""
    suffix = Path(file.removesuffix(".gz")).suffix
    if suffix in DELIMITERS:
        yield from _read_cells(file, DELIMITERS[suffix])
        return
    yield from _read_objects(file)


def _read_objects(file: str) -> Rows:
    number = 0
    with open_lines(file) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, dict(load_record(line, file, number).values)
                    except ManifestError as error:
                        yield number, error
        except (EOFError, OSError, zlib.error) as error:
            yield number + 1, ManifestError(file, number + 1, "", "a whole gzip file", str(error))


def _read_cells(file: str, delimiter: str) -> Rows:
    with io.TextIOWrapper(open_lines(file), encoding="utf-8-sig", newline="") as lines:
        table = csv.reader(lines, delimiter=delimiter)
        try:
            names = next(table, [])
            for cells in table:
                if len(cells) == len(names):
                    yield table.line_num, dict(zip(names, cells, strict=True))
                elif cells:
                    found = ManifestError(file, table.line_num, "", f"{len(names)} cells", f"{len(cells)}")
                    yield table.line_num, found
        except (csv.Error, EOFError, OSError, UnicodeDecodeError, zlib.error) as error:
            yield table.line_num + 1, ManifestError(file, table.line_num + 1, "", "a whole table", str(error))
