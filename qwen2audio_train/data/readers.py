"""Readers of corpora in other forms than ours: each yields rows, plain dicts with the corpus's own columns.

A row that cannot be read comes as a ManifestError in its place. Paths of audio are relative to the corpus's folder
where the corpus has them so.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from qwen2audio_train.data.blobs import BlobError, TarMember, list_members
from qwen2audio_train.data.record import ManifestError, load_record

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row | ManifestError]]
"""Rows with their numbers, counted from 1: those of the lines where the corpus has lines."""

AUDIO_SUFFIXES = ("flac", "wav", "ogg", "opus", "mp3", "m4a", "aac", "webm", "mp4")
DELIMITERS = {".csv": ",", ".tsv": "\t"}

LARGEST_TEXT = 2**24
"""Bytes of a text or JSON member of a tar."""


def read_kaldi(folder: str) -> Rows:
    """A Kaldi data folder: wav.scp, text, and where they exist segments, utt2dur, utt2spk, utt2lang.

    Columns: id, audio, text, start_s, end_s, duration_s, speaker, language.
    """
    place = Path(folder)
    recordings = dict(_pairs(place / "wav.scp"))
    extra = {"duration_s": "utt2dur", "speaker": "utt2spk", "language": "utt2lang"}
    more = {column: dict(_pairs(place / name)) for column, name in extra.items() if (place / name).exists()}
    segments = dict(_pairs(place / "segments")) if (place / "segments").exists() else None
    path = str(place / "text")
    for number, (name, text) in enumerate(_pairs(place / "text"), start=1):
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
        return recording, {"start_s": float(start), "end_s": float(end)}
    except (KeyError, ValueError):
        found = segments.get(name, "none")
        raise ManifestError(path, line, "segments", f'"<recording> <start> <end>" for "{name}"', found) from None


def read_lhotse(file: str) -> Rows:
    """A lhotse manifest of cuts (JSONL, also gzipped), one channel of one recording each.

    Columns: id, audio, start_s, end_s, duration_s, text, language, speaker, and the cut's `custom` fields.
    """
    with gzip.open(file) if file.endswith(".gz") else Path(file).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield number, _cut(dict(load_record(line, file, number).values), file, number)
            except ManifestError as error:
                yield number, error


def _cut(cut: Mapping[str, Any], file: str, line: int) -> Row:
    try:
        (source,) = cut["recording"]["sources"]
        kind, audio = source["type"], source["source"]
        start, length = float(cut["start"]), float(cut["duration"])
        spoken = cut.get("supervisions") or []
        if kind not in ("file", "url"):
            raise ManifestError(file, line, "recording.sources", "a file or a url", str(kind))
        row = {"id": cut["id"], "audio": audio, "start_s": start, "end_s": start + length, "duration_s": length}
        row["text"] = " ".join(item["text"] for item in spoken if item.get("text"))
        row |= {key: spoken[0][key] for key in ("language", "speaker") if spoken and spoken[0].get(key)}
        return row | dict(cut.get("custom") or {})
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ManifestError):
            raise
        kind = cut.get("type", "no type")
        found = f"{kind} ({type(error).__name__}: {error})"
        raise ManifestError(file, line, "", "a MonoCut with one recording of one source", found) from None


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
            if row:
                yield number, row


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

    Columns: the file's own, and `__key__`, the row's number.
    """
    import pyarrow as pa  # slow to import, and only Arrow files need it

    number = 0
    try:
        with pa.memory_map(file) as mapped, pa.ipc.open_stream(mapped) as batches:
            for batch in batches:
                plain = batch.drop_columns([audio]) if audio in batch.schema.names else batch
                for row in plain.to_pylist():
                    path = f"{shown}::{number}/{audio}"
                    number += 1
                    yield number, {"__key__": f"{Path(shown).stem}/{number - 1}", **row, audio: path}
    except (OSError, ValueError) as error:
        yield number + 1, ManifestError(shown, number + 1, "", "a whole Arrow stream", str(error))


def read_table(file: str) -> Rows:
    """A table: CSV or TSV with a line of names by the file's ending, else JSONL; the columns are its own."""
    suffix = Path(file).suffix
    if suffix in DELIMITERS:
        yield from _read_cells(file, DELIMITERS[suffix])
        return
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, dict(load_record(line, file, number).values)
                except ManifestError as error:
                    yield number, error


def _read_cells(file: str, delimiter: str) -> Rows:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        table = csv.reader(lines, delimiter=delimiter)
        names = next(table, [])
        for cells in table:
            if len(cells) == len(names):
                yield table.line_num, dict(zip(names, cells, strict=True))
            elif cells:
                found = ManifestError(file, table.line_num, "", f"{len(names)} cells", f"{len(cells)}")
                yield table.line_num, found
