"""Folders of audio files as a source: which of their files hold the rows, and which form that is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.manifests.tables import DELIMITERS, Rows, suffix_of
from qwen2audio_train.data.manifests.tars import AUDIO_SUFFIXES

METADATA = "metadata"
"""Name of the tables of an AudioFolder, which stand beside the audio that they tell of."""

SPLITS = (("train", "training"), ("validation", "valid", "val", "dev"), ("test", "testing", "eval", "evaluation"))
"""Names of the same split."""


def tables_in(folder: str, split: str | None) -> list[str]:
    """The tables of a folder: the `metadata` files where there are any, else all CSV, TSV and JSON Lines in it.

    Raises:
        ConfigError: a split that none of them belongs to.
    """
    found = [str(path) for path in sorted(Path(folder).rglob("*")) if _is_table(path)]
    metadata = [path for path in found if Path(path).name.lower().startswith(f"{METADATA}.")]
    return _of_split(metadata or found, folder, split)


def has_audio(folder: str) -> bool:
    """Whether audio files lie in a folder or below it."""
    return next(_audio_files(folder), None) is not None


def read_audio_folder(folder: str, split: str | None) -> Rows:
    """Audio files in a folder per class, as the `datasets` library's AudioFolder has them.

    Columns: __key__ and file_name, the path below the folder; label, the name of the folder that the file lies in.
    """
    files = _of_split([os.path.join(folder, name) for name in sorted(_audio_files(folder))], folder, split)
    for number, file in enumerate(files, start=1):
        name = os.path.relpath(file, folder)
        yield number, {"__key__": name, "file_name": name, "label": os.path.basename(os.path.dirname(file))}


def _is_table(path: Path) -> bool:
    wanted = (*DELIMITERS, ".jsonl", ".ndjson")
    return path.is_file() and not path.name.startswith(".") and suffix_of(str(path)) in wanted


def _audio_files(folder: str) -> Iterator[str]:
    for path in Path(folder).rglob("*"):
        if path.suffix[1:].lower() in AUDIO_SUFFIXES and not path.name.startswith("."):
            yield str(path.relative_to(folder))


def _of_split(files: list[str], folder: str, split: str | None) -> list[str]:
    """The files whose path below the folder names the split; all of them where none is asked for."""
    if split is None:
        return files
    names = next((names for names in SPLITS if split in names), (split,))
    words = {file: set(re.split(r"[/\\._-]", os.path.relpath(file, folder).lower())) for file in files}
    found = [file for file in files if words[file] & set(names)]
    if not found:
        told = {names[0] for names in SPLITS for of_file in words.values() if of_file & set(names)}
        known = ", ".join(sorted(told)) or "none by their names"
        raise ConfigError(f"{folder}: no file of the split {split!r} ({len(files)} files; splits there: {known})")
    return found
