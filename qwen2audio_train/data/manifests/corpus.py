"""A source of the recipe as rows: its form, its shards, and which of its columns are our fields."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qwen2audio_train.config.data import SourceConfig, SourceFormat
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.manifests.columns import check_columns, columns_of, map_row
from qwen2audio_train.data.manifests.hub import HubStream, arrow_files, is_table
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.readers import (
    Row,
    Rows,
    open_lines,
    read_arrow,
    read_kaldi,
    read_lhotse,
    read_table,
    read_tar,
)
from qwen2audio_train.data.storage.paths import expand_paths
from qwen2audio_train.data.storage.remote import Remote

SPOKEN = {
    "id": "id",
    "audio": "audio",
    "target": "text",
    "start_s": "start_s",
    "end_s": "end_s",
    "duration_s": "duration_s",
    "channel": "channel",
}
DEFAULT_COLUMNS: dict[SourceFormat, dict[str, str]] = {
    SourceFormat.manifest: {},
    SourceFormat.kaldi: SPOKEN,
    SourceFormat.lhotse: SPOKEN,
    SourceFormat.webdataset: {"id": "__key__", "audio": "audio", "target": "txt"},
    SourceFormat.huggingface: {"id": "__key__", "audio": "audio", "target": "text"},
}
"""Our field -> the column that a form usually has it in."""


OWN_RECORD = "qwen2audio_train"
"""Key of a JSON member that marks it as a record of ours, whose audio is named by members."""

Contents = tuple[bytes | None, ...] | None


@dataclass(frozen=True)
class Corpus:
    """The files (shards) of a source, read row by row.

    `columns` and `constants` say what becomes of a row; without either a row already is a record of ours.
    """

    name: str
    kind: SourceFormat
    files: tuple[str, ...]
    columns: Mapping[str, str]
    constants: Mapping[str, str]
    remote: Remote
    hub: HubStream | None = None

    @property
    def is_ours(self) -> bool:
        """Whether its rows are records of ours as they stand."""
        return not self.columns and not self.constants

    @property
    def num_shards(self) -> int:
        return self.hub.num_shards if self.hub else len(self.files)

    def place(self, shard: int) -> str:
        """The path that relative paths of a shard, and errors about it, refer to."""
        if self.hub:
            return f"{self.hub.name}/{shard}"
        file = self.files[shard]
        return os.path.join(file, "text") if self.kind is SourceFormat.kaldi else file

    def local(self, shard: int) -> str:
        """Where the shard lies, fetched if need be. Raises RemoteError."""
        file = self.files[shard]
        return self.remote.shard(file) if "://" in file else file

    def rows(self, shard: int) -> Rows:
        """The rows of a shard, in order."""
        file, local = self.files[shard], self.local(shard)
        if self.kind is SourceFormat.kaldi:
            return read_kaldi(file)
        if self.kind is SourceFormat.lhotse:
            return read_lhotse(local)
        if self.kind is SourceFormat.webdataset:
            return read_tar(local, file if "://" in file else os.path.basename(file))
        if self.kind is SourceFormat.huggingface:
            return read_arrow(file, os.path.basename(file), self.columns["audio"])
        return read_table(local)

    def rows_with_bytes(self, shard: int) -> Iterator[tuple[int, Row | ManifestError, Contents]]:
        """The rows of a shard, with the bytes of their audio where the reader holds them anyway."""
        if self.hub:
            for number, (row, contents) in enumerate(self.hub.rows(shard, self.columns["audio"]), start=1):
                yield number, row, contents
        else:
            yield from ((number, row, None) for number, row in self.rows(shard))

    def record(self, row: Row) -> dict[str, Any]:
        """Our record of a row. A tar that `launch/data.py shard` wrote holds records of ours beside the audio."""
        if self.is_ours:
            return row
        json_member = row.get("json")
        if self.kind is SourceFormat.webdataset and isinstance(json_member, dict) and OWN_RECORD in json_member:
            return _with_members({k: v for k, v in json_member.items() if k != OWN_RECORD}, row["__members__"])
        return {"source": self.name, **map_row(row, self.columns, self.constants)}


def open_corpus(name: str, source: SourceConfig, remote: Remote, key: str = "data.sources") -> Corpus:
    """The corpus that a source of the recipe names.

    Raises:
        FileNotFoundError: a path that names nothing.
        ConfigError: an unknown form; several data sets in one stream; a column that the corpus does not have.
    """
    where = f"{key}.{name}" if key else "input"
    kind, files, hub = source.format, list(source.path), None
    if kind is SourceFormat.auto and source.split is not None:
        kind = SourceFormat.huggingface
    tables = all(map(is_table, files))
    if kind is not SourceFormat.huggingface or tables:
        files = expand_paths(source.path, f"{where}.path")
        kind = detect_format(files[0], where) if kind is SourceFormat.auto else kind
    if kind is SourceFormat.huggingface:
        if source.streaming:
            if len(files) > 1 and not tables:
                raise ConfigError(f"{where}.path: {len(files)} data sets in one stream; make each a source of its own")
            hub = HubStream(files[0], source.subset, source.split, source.revision, tuple(files) if tables else ())
        else:
            files = [f for path in files for f in arrow_files(path, source.subset, source.split, source.revision)]
    columns = DEFAULT_COLUMNS[kind] | source.columns
    if kind is SourceFormat.manifest and source.constants and not columns:
        columns = _same_columns(files[0], remote)
    corpus = Corpus(name, kind, tuple(files), columns, source.constants, remote, hub)
    if key:
        _check_first_columns(corpus, source.columns, where)
    return corpus


def detect_format(path: str, where: str) -> SourceFormat:
    """The form of a corpus by its first path. Raises ConfigError."""
    place = Path(path)
    if path.split("?")[0].endswith(".tar"):
        return SourceFormat.webdataset
    if is_table(path):
        return SourceFormat.huggingface
    if "://" in path and path.endswith(".jsonl.gz"):
        return SourceFormat.lhotse
    if "://" in path or place.is_file():
        return SourceFormat.lhotse if _is_lhotse(place) else SourceFormat.manifest
    if (place / "wav.scp").exists():
        return SourceFormat.kaldi
    if any(place.glob("*.json")) or next(place.rglob("*.parquet"), None):
        return SourceFormat.huggingface
    choices = ", ".join(kind.value for kind in SourceFormat)
    raise ConfigError(f"{where}.format: {path} is of no form that can be told by its looks; set one of {choices}")


def _with_members(value: Any, members: Mapping[str, str]) -> Any:
    """The same record with the members' places in the stead of their names."""
    if isinstance(value, dict):
        return {key: _with_members(item, members) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_members(item, members) for item in value]
    return members.get(value, value) if isinstance(value, str) else value


def _is_lhotse(file: Path) -> bool:
    try:
        with open_lines(str(file)) as lines:
            first = json.loads(next(iter(lines), b"{}"))
    except (EOFError, OSError, ValueError):
        return False
    return isinstance(first, dict) and "recording" in first and "supervisions" in first


def _same_columns(file: str, remote: Remote) -> dict[str, str]:
    """Our fields under our names, for a manifest that lacks nothing but constants."""
    rows = read_table(remote.shard(file) if "://" in file else file)
    return {column: column for _, row in islice(rows, 20) if isinstance(row, dict) for column in row}


def _check_first_columns(corpus: Corpus, asked: Mapping[str, str], where: str) -> None:
    """Refuse a column that none of the first rows has."""
    if asked and corpus.num_shards > 0:
        rows = [row for _, row, _ in islice(corpus.rows_with_bytes(0), 20) if isinstance(row, dict)]
        known = {column for row in rows for column in columns_of(row)}
        check_columns({f"{where}.columns.{name}": c for name, c in asked.items()}, known, corpus.place(0))
