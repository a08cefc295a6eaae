"""WebDataset shards as rows."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import IO

from qwen2audio_train.data.manifests.json_object import ManifestError, load_record
from qwen2audio_train.data.manifests.tables import Row, Rows
from qwen2audio_train.data.storage.blobs import BlobError, TarMember, list_members

AUDIO_SUFFIXES = (
    *("flac", "wav", "wave", "ogg", "oga", "opus", "mp3", "m4a", "m4b", "aac", "webm", "mka", "mkv", "mp4", "mov"),
    *("sph", "aif", "aiff", "aifc", "au", "snd", "w64", "rf64", "caf", "amr", "wma"),
)
"""Endings of the members that are audio; whether one can be decoded is the decoder's to say."""

LARGEST_TEXT = 2**24
"""Bytes of a text or JSON member of a tar."""


TEXT_SUFFIXES = ("txt", "json", "cls", "text", "lang")


def read_tar(tar: str, shown: str) -> Rows:
    """A WebDataset shard: neighbouring members with the same name up to the first dot are one row.

    Members whose names begin with a dot are none: a Mac writes `._a.wav` beside every `a.wav`.

    Columns: __key__, the name up to the first dot; __path__, the same after the shard's own name; audio, the placed
    path of the first member that is audio; __members__, the places of all that are no text; every other member under
    what follows the first dot: `txt` and `cls` as text, `json` as an object.

    Args:
        shown: what the shard is called in paths and errors.
    """
    number = 0
    with open(tar, "rb") as file:
        try:
            members = (member for member in list_members(file) if not _is_hidden(member.name))
            for number, (key, group) in enumerate(groupby(members, key=lambda member: _parts(member.name)[0]), start=1):
                row: Row = {"__key__": key, "__path__": f"{Path(shown).stem}/{key}", "__members__": {}}
                try:
                    for member in list(group):
                        _add_member(row, file, member, shown, number)
                    yield number, row
                except ManifestError as error:
                    yield number, error
        except BlobError as error:
            yield number + 1, ManifestError(shown, number + 1, "", "a whole tar file", str(error))
        else:
            if not number:
                yield 1, ManifestError(shown, 1, "", "a tar file with files in it", "none")


def _is_hidden(name: str) -> bool:
    return name.startswith("__MACOSX/") or name.rpartition("/")[2].startswith(".")


def _parts(name: str) -> tuple[str, str]:
    """Key and ending of a member: `a/b` and `seg.json` of `a/b.seg.json`."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def _add_member(row: Row, file: IO[bytes], member: TarMember, shown: str, number: int) -> None:
    suffix = _parts(member.name)[1]
    kind = suffix.rsplit(".", 1)[-1]
    if kind not in TEXT_SUFFIXES:
        row["__members__"][member.name] = member.placed(shown)
        if kind in AUDIO_SUFFIXES:
            row.setdefault("audio", member.placed(shown))
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
