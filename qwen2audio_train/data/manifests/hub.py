"""Data sets in the form of the `datasets` library: on disk, from the hub, or streamed from there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.manifests.arrow import TABLES, beside, class_names, name_classes
from qwen2audio_train.data.storage.blobs import BlobError
from qwen2audio_train.data.storage.paths import relative_names

KINDS = (("parquet", "**/*.parquet"), ("arrow", "**/*.arrow"))
"""Builders of `datasets` for a local folder, and the files that it is told by."""

BATCH_ROWS = 16
"""Rows that are read at a time from a stream."""


@dataclass(frozen=True)
class ArrowFile:
    """Rows of a data set: their file, the name that tells them from those of its other files, and what the paths in
    them may be relative to."""

    path: str
    label: str
    folders: tuple[str, ...]


@dataclass(frozen=True)
class HubStream:
    """A data set that is read front to back, shard by shard, without a copy on disk; or `files` of one."""

    path: str
    subset: str | None
    split: str | None
    revision: str | None
    files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "/".join(filter(None, (self.path, self.subset, self.split)))

    @property
    def num_shards(self) -> int:
        return int(self._dataset.num_shards)

    def rows(self, shard: int, audio: str) -> Iterator[tuple[dict[str, Any], tuple[bytes | None, ...] | None]]:
        """The rows of a shard with the bytes of the audio; the column `audio` becomes the path that stands beside them.

        Columns: the data set's own, class labels by their names, and `__key__`, the row's number.
        """
        features = self._dataset.features
        classes = class_names(features.to_dict()) if features else {}
        folders = folders_of(self.path, self.files)
        for number, row in enumerate(_readable(self._rows(shard, audio))):
            row = name_classes(row, classes)
            cell = row[audio] if isinstance(row.get(audio), dict) else {"path": row.get(audio)}
            data, path = cell.get("bytes"), cell.get("path")
            if data is None and isinstance(path, str):
                path = beside(path, folders)
            key = {"__key__": f"{shard}/{number}"}
            named = path or (None if data is None else f"{shard}-{number}")
            yield {**key, **row, audio: named}, None if data is None else (data,)

    def _rows(self, shard: int, audio: str) -> Iterator[dict[str, Any]]:
        # in batches, as rows one by one would be divided among a DataLoader's workers, each of which has its own shards
        for batch in self._raw_audio(audio).shard(self.num_shards, shard).iter(BATCH_ROWS):
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))

    def _raw_audio(self, audio: str) -> Any:
        from datasets import Audio

        features = self._dataset.features or {}
        return self._dataset.cast_column(audio, Audio(decode=False)) if audio in features else self._dataset

    @cached_property
    def _dataset(self) -> Any:
        return _load(self.path, self.subset, self.split, self.revision, streaming=True, files=self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_dataset"}


def _readable(rows: Any) -> Iterator[Any]:
    """The rows. Raises BlobError for whatever `datasets` and the many readers that it calls raise of a shard."""
    try:
        yield from rows
    except Exception as error:
        raise BlobError(f"the shard cannot be read ({type(error).__name__}: {error})") from error


def is_table(path: str) -> bool:
    """Whether a path names files of a data set (globs too) and not the data set."""
    return path.endswith(TABLES)


def folders_of(path: str, files: Sequence[str] = ()) -> tuple[str, ...]:
    """The folders that relative paths in a data set on disk may be relative to, likeliest first."""
    if files:
        return tuple(dict.fromkeys(os.path.dirname(file) or "." for file in files))
    if not os.path.isdir(path):
        return ()
    inside = (str(file.parent) for _, pattern in KINDS for file in sorted(Path(path).glob(pattern)))
    return tuple(dict.fromkeys([path, *inside]))


def arrow_files(
    paths: Sequence[str], subset: str | None, split: str | None, revision: str | None
) -> tuple[ArrowFile, ...]:
    """The Arrow files of data sets on disk (`save_to_disk`), or from the hub, downloaded if need be.

    Parquet files become Arrow files in the cache of `datasets` (a second copy on disk; `streaming` makes none).

    Raises:
        ConfigError: a split is missing; a choice of rows (`select`, `shuffle`) lies over the files.
    """
    labels = relative_names(paths)
    found: list[ArrowFile] = []
    for path, label in zip(paths, labels, strict=True):
        if is_table(path):
            folders = folders_of(path, (path,))
            files = [path] if path.endswith(".arrow") else _cached(path, None, None, None, (path,))
            names = [os.path.splitext(label)[0]] if len(files) == 1 else [Path(file).stem for file in files]
        else:
            folders = folders_of(path)
            files = _saved(Path(path), split) or _cached(path, subset, split, revision, ())
            names = [f"{label}/{Path(file).stem}" if len(paths) > 1 else Path(file).stem for file in files]
        found += [ArrowFile(file, name, folders) for file, name in zip(files, names, strict=True)]
    return tuple(found)


def _saved(folder: Path, split: str | None) -> list[str]:
    """The files of `save_to_disk`, none in a folder of another kind."""
    if split and (folder / split / "state.json").exists():
        folder = folder / split
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ConfigError(f"{folder}: split {split!r} is none of {', '.join(splits)}")
    if not (folder / "state.json").exists():
        return []
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if saved.get("_indices_data_files"):
        raise ConfigError(f"{folder}: holds a selection of rows; call flatten_indices() before save_to_disk()")
    return [str(folder / item["filename"]) for item in saved["_data_files"]]


def _cached(
    path: str, subset: str | None, split: str | None, revision: str | None, files: tuple[str, ...]
) -> list[str]:
    loaded = _load(path, subset, split, revision, streaming=False, files=files)
    return [os.path.abspath(item["filename"]) for item in loaded.cache_files]


def _load(
    path: str, subset: str | None, split: str | None, revision: str | None, streaming: bool, files: tuple[str, ...]
) -> Any:
    from datasets import load_dataset  # slow to import, and only these sources need it

    if split is None and not files:
        raise ConfigError(f"{path}: name a split")
    folder = Path(path)
    try:
        if files:
            return load_dataset(Path(files[0]).suffix[1:], data_files=list(files), split="train", streaming=streaming)
        if not folder.is_dir():
            return load_dataset(path, subset, split=split, revision=revision, streaming=streaming)
        kind = next((kind for kind, pattern in KINDS if next(folder.glob(pattern), None)), None)
        if kind is None:
            raise ConfigError(f"{path}: neither files of save_to_disk() nor Parquet or Arrow are in it")
        return load_dataset(kind, data_dir=path, split=split, streaming=streaming)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from error
