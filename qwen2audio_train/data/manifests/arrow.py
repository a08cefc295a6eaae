"""Arrow files as the `datasets` library writes them, as rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.tables import Row, Rows

TABLES = (".parquet", ".arrow")
"""Endings of the files that the `datasets` library keeps its rows in."""


def read_arrow(file: str, audio: str, label: str, folders: Sequence[str]) -> Rows:
    """An Arrow file as `datasets` writes it; the column `audio` becomes the path of its cell, the others stay.

    A cell that holds the path of a file instead of its bytes becomes that path.

    Columns: the file's own, class labels by their names, and `__key__`, the row's number after `label`.

    Args:
        folders: what relative paths in cells may be relative to.
    """
    import pyarrow as pa  # slow to import, and only Arrow files need it

    shown = os.path.basename(file)
    number = 0
    try:
        with pa.memory_map(file) as mapped, pa.ipc.open_stream(mapped) as batches:
            info = (batches.schema.metadata or {}).get(b"huggingface", b"{}")
            classes = class_names(json.loads(info).get("info", {}).get("features") or {})
            for batch in batches:
                has_audio = audio in batch.schema.names
                paths = _paths(batch.column(audio)) if has_audio else [None] * batch.num_rows
                plain = batch.drop_columns([audio]) if has_audio else batch
                for row, path in zip(plain.to_pylist(), paths, strict=True):
                    cell = f"{shown}::{number}/{audio}"
                    number += 1
                    clip = cell if path is None else beside(path, folders)
                    yield number, {"__key__": f"{label}/{number - 1}", **name_classes(row, classes), audio: clip}
    except (OSError, ValueError) as error:
        yield number + 1, ManifestError(shown, number + 1, "", "a whole Arrow stream", str(error))


def _paths(column: Any) -> list[str | None]:
    """Paths of the cells that hold no bytes; None for the others."""
    import pyarrow as pa  # slow to import, and only Arrow files need it

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return list(column.to_pylist())
    if not pa.types.is_struct(column.type) or not {"bytes", "path"} <= {field.name for field in column.type}:
        return [None] * len(column)
    is_empty = column.field("bytes").is_null().to_pylist()
    return [path if empty else None for empty, path in zip(is_empty, column.field("path").to_pylist(), strict=True)]


def beside(path: str, folders: Sequence[str]) -> str:
    """A relative path below the first of the folders that has it; below the first one where none has."""
    if "://" in path or os.path.isabs(path) or not folders:
        return path
    places = [os.path.abspath(os.path.join(folder, path)) for folder in folders]
    return next((place for place in places if os.path.exists(place)), places[0])


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
