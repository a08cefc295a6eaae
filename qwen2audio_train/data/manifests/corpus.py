"""A source of the recipe as rows: its form, its shards, and which of its columns are our fields."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qwen2audio_train.config.data import SourceConfig, SourceFormat
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.manifests.arrow import TABLES, read_arrow
from qwen2audio_train.data.manifests.columns import check_columns, columns_of, map_row, reaches
from qwen2audio_train.data.manifests.conversations import own_form
from qwen2audio_train.data.manifests.folders import has_audio, read_audio_folder, tables_in
from qwen2audio_train.data.manifests.hub import ArrowFile, HubStream, arrow_files, is_table
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.readers import read_kaldi, read_lhotse
from qwen2audio_train.data.manifests.tables import TABLE_SUFFIXES, Row, Rows, read_table, suffix_of
from qwen2audio_train.data.manifests.tars import read_tar
from qwen2audio_train.data.storage.paths import expand_paths, relative_names
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
    SourceFormat.audiofolder: {"id": "__key__", "audio": "file_name", "target": "label"},
}
"""Our field -> the column that a form usually has it in."""

TABLE_COLUMNS = {
    "audio_filepath": {"audio": "audio_filepath", "target": "text", "start_s": "offset", "duration_s": "duration"},
    "file_name": {"audio": "file_name"},
}
"""A column that a table is known by (NeMo's manifests, the metadata of an AudioFolder) -> what its columns are."""

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
"""Archives in which no member can be found without unpacking those before it."""

OWN_RECORD = "qwen2audio_train"
"""Key of a JSON member that marks it as a record of ours, whose audio is named by members."""

FIRST_ROWS = 20
"""Rows that the form and the columns of a table are told by."""

Contents = tuple[bytes | None, ...] | None


@dataclass(frozen=True)
class Corpus:
    """The files (shards) of a source, read row by row.

    `columns` and `constants` say what becomes of a row; without either a row is a record of ours, or a conversation in
    the form of another project. `labels` name the files where a row has no id of its own; `recordings` is the folder
    for audio that rows hold as text.
    """

    name: str
    kind: SourceFormat
    files: tuple[str, ...]
    columns: Mapping[str, str]
    constants: Mapping[str, str]
    remote: Remote
    hub: HubStream | None = None
    split: str | None = None
    arrows: tuple[ArrowFile, ...] = ()
    labels: Mapping[str, str] | None = None
    recordings: str = ""

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
        inside = {SourceFormat.kaldi: "text", SourceFormat.audiofolder: ""}.get(self.kind)
        return file if inside is None else os.path.join(file, inside)

    def local(self, shard: int) -> str:
        """Where the shard lies, fetched if need be. Raises RemoteError."""
        return _local(self.files[shard], self.remote)

    def rows(self, shard: int) -> Rows:
        """The rows of a shard, in order."""
        file, local = self.files[shard], self.local(shard)
        if self.kind is SourceFormat.kaldi:
            return read_kaldi(file)
        if self.kind is SourceFormat.audiofolder:
            return read_audio_folder(file, self.split)
        if self.kind is SourceFormat.lhotse:
            return read_lhotse(local)
        if self.kind is SourceFormat.webdataset:
            return self._undotted(read_tar(local, file if "://" in file else os.path.basename(file)), file)
        if self.kind is SourceFormat.huggingface:
            return read_arrow(file, self.columns["audio"], self.arrows[shard].label, self.arrows[shard].folders)
        return read_table(local, file)

    def rows_with_bytes(self, shard: int) -> Iterator[tuple[int, Row | ManifestError, Contents]]:
        """The rows of a shard, with the bytes of their audio where the reader holds them anyway."""
        if self.hub:
            for number, (row, contents) in enumerate(self.hub.rows(shard, self.columns["audio"]), start=1):
                yield number, row, contents
        else:
            yield from ((number, row, None) for number, row in self.rows(shard))

    def record(self, row: Row, place: str, number: int) -> dict[str, Any]:
        """Our record of row `number` of the shard at `place`; a row without an id is called by both.

        A tar that `launch/data.py shard` wrote holds records of ours beside the audio.

        Raises:
            ManifestError: a conversation that is no example of ours.
        """
        json_member = row.get("json")
        if self.kind is SourceFormat.webdataset and isinstance(json_member, dict) and OWN_RECORD in json_member:
            return _with_members({k: v for k, v in json_member.items() if k != OWN_RECORD}, row["__members__"])
        own = dict(row) if self.is_ours else {"source": self.name, **map_row(row, self.columns, self.constants)}
        if "id" not in own and "id" not in self.columns:
            label = (self.labels or {}).get(place, os.path.basename(place))
            own["id"] = f"{label}:{number}"
        return own_form(own, place, number, Path(self.recordings))

    def _undotted(self, rows: Rows, file: str) -> Rows:
        """The rows of a tar; one that lacks the text because of a dot in its name says so."""
        wanted = self.columns["target"]
        for number, row in rows:
            if isinstance(row, dict) and not reaches(row, wanted) and "json" not in row:
                dotted = next((name for name in row if name.endswith(f".{wanted.partition('.')[0]}")), None)
                if dotted:
                    expected = f'"{wanted}" behind the first dot of the name: a key has no dot (WebDataset\'s rule)'
                    yield number, ManifestError(file, number, "target", expected, f'"{row["__key__"]}.{dotted}"')
                    continue
            yield number, row


def open_corpus(name: str, source: SourceConfig, remote: Remote, where: str | None = None) -> Corpus:
    """The corpus that a source of the recipe names.

    Args:
        where: key of the source for errors; by default data.sources.<name>.

    Raises:
        FileNotFoundError: a path that names nothing.
        ConfigError: an unknown form; several data sets in one stream; a column that the corpus does not have.
    """
    where = where or f"data.sources.{name}"
    kind, files = source.format, list(source.path)
    hub: HubStream | None = None
    arrows: tuple[ArrowFile, ...] = ()
    tables = all(map(is_table, files))
    if kind is SourceFormat.auto and source.split is not None and not any(map(os.path.exists, files)) and not tables:
        kind = SourceFormat.huggingface
    if kind is not SourceFormat.huggingface or tables:
        files = expand_paths(source.path, f"{where}.path" if "." in where else where)
        kind = detect_format(files[0], where, remote) if kind is SourceFormat.auto else kind
    if kind is SourceFormat.huggingface and source.streaming:
        if len(files) > 1 and not tables:
            raise ConfigError(f"{where}.path: {len(files)} data sets in one stream; make each a source of its own")
        hub = HubStream(files[0], source.subset, source.split, source.revision, tuple(files) if tables else ())
    elif kind is SourceFormat.huggingface:
        arrows = arrow_files(files, source.subset, source.split, source.revision)
        files = [arrow.path for arrow in arrows]
    elif kind is SourceFormat.manifest:
        files = [inner for file in files for inner in _tables(file, source.split)]
    columns = _columns(kind, source, files, remote)
    labels = dict(zip(files, relative_names(files), strict=True))
    recordings = os.path.join(remote.cache_dir, "recordings")
    return Corpus(
        name, kind, tuple(files), columns, source.constants, remote, hub, source.split, arrows, labels, recordings
    )


def detect_format(path: str, where: str, remote: Remote) -> SourceFormat:
    """The form of a corpus by its first path. Raises ConfigError."""
    plain = path.split("?")[0] if "://" in path else path
    if plain.lower().endswith(PACKED):
        raise ConfigError(f"{where}.path: {path} is compressed as a whole; unpack it to a plain .tar, or to files")
    if plain.endswith(".tar"):
        return SourceFormat.webdataset
    if is_table(path):
        return SourceFormat.huggingface
    if "://" in path or os.path.isfile(path):
        first = next((row for _, row in _first_rows(path, remote)), None)
        is_known = suffix_of(path) in TABLE_SUFFIXES
        if not is_known and not isinstance(first, dict) and first is not None:
            raise ConfigError(
                f"{where}.path: {path} is no table that is read (JSON Lines, a JSON array, .csv, .tsv, also .gz): save "
                "it as CSV in UTF-8, or set format"
            )
        is_lhotse = isinstance(first, dict) and "recording" in first and "supervisions" in first
        return SourceFormat.lhotse if is_lhotse else SourceFormat.manifest
    return _folder_format(Path(path), where)


def _folder_format(place: Path, where: str) -> SourceFormat:
    if (place / "wav.scp").exists():
        return SourceFormat.kaldi
    saved = ("dataset_dict.json", "state.json", "dataset_info.json")
    inside = (place.rglob(f"*{ending}") for ending in TABLES)
    if any((place / name).exists() for name in saved) or any(next(found, None) for found in inside):
        return SourceFormat.huggingface
    if tables_in(str(place), None):
        return SourceFormat.manifest
    if has_audio(str(place)):
        return SourceFormat.audiofolder
    choices = ", ".join(kind.value for kind in SourceFormat)
    key = f"{where}.format" if "." in where else where
    raise ConfigError(f"{key}: {place} is of no form that can be told by its looks; set format to one of {choices}")


def check_first_columns(corpus: Corpus, asked: Mapping[str, str], where: str) -> None:
    """Refuse a column that none of the first rows has. Raises ConfigError."""
    if asked and corpus.num_shards > 0:
        rows = [row for _, row, _ in islice(corpus.rows_with_bytes(0), FIRST_ROWS) if isinstance(row, dict)]
        known = {column for row in rows for column in columns_of(row)}
        check_columns({f"{where}.columns.{name}": c for name, c in asked.items()}, known, corpus.place(0))


def _columns(kind: SourceFormat, source: SourceConfig, files: Sequence[str], remote: Remote) -> dict[str, str]:
    """Our field -> the corpus's column: what the recipe says, over what the form usually has."""
    if kind is not SourceFormat.manifest:
        return DEFAULT_COLUMNS[kind] | source.columns
    if not source.constants and not source.columns:
        return {}
    seen = {column for _, row in _first_rows(files[0], remote) if isinstance(row, dict) for column in row}
    usual = next((columns for known, columns in TABLE_COLUMNS.items() if known in seen), {})
    usual = {field: column for field, column in usual.items() if column in seen}
    if not usual and not source.columns:  # it lacks nothing but the constants
        return {column: column for column in seen}
    return usual | source.columns


def _first_rows(file: str, remote: Remote) -> Rows:
    return islice(read_table(_local(file, remote), file), FIRST_ROWS)


def _local(file: str, remote: Remote) -> str:
    if "://" not in file:
        return file
    return remote.current_tar(file) if file.endswith(".tar") else remote.current(file)


def _tables(file: str, split: str | None) -> list[str]:
    return tables_in(file, split) if os.path.isdir(file) else [file]


def _with_members(value: Any, members: Mapping[str, str]) -> Any:
    """The same record with the members' places in the stead of their names."""
    if isinstance(value, dict):
        return {key: _with_members(item, members) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_members(item, members) for item in value]
    return members.get(value, value) if isinstance(value, str) else value
