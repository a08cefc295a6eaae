"""Kaldi folders and lhotse cuts as rows, plain dicts with the corpus's own columns.

A row that cannot be read comes as a ManifestError in its place. Paths of audio are relative to the corpus's folder
where the corpus has them so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.tables import Row, Rows, read_objects


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
    for number, name, text in _numbered(place / "text"):
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
    return ((name, value) for _, name, value in _numbered(path))


def _numbered(path: Path) -> Iterator[tuple[int, str, str]]:
    """The first word of every line and what follows it, with the line's number; blank lines are passed over."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if parts := line.strip().split(maxsplit=1):
                yield number, parts[0], parts[1] if len(parts) > 1 else ""


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
    for number, row in read_objects(file):
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
