"""From a source of the recipe to manifests on disk, whatever the form that the corpus has.

Manifests of ours are taken as they are. Everything else is written down once, in our form, into the cache: one manifest
per file of the corpus, audio left where it is (slices of recordings, members of tars, cells of Arrow files).
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen2audio_train.config.data import SourceConfig, SourceFormat
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.manifests.corpus import Corpus, open_corpus
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.manifest import parse_line
from qwen2audio_train.data.storage.blobs import PLACED, BlobError, TarMember, member_places
from qwen2audio_train.data.storage.files import text_hash, write_whole
from qwen2audio_train.data.storage.parallel import in_order, processes
from qwen2audio_train.data.storage.remote import Remote

VERSION = 2

ERROR_KEY = "__error__"
"""Key of a line that stands for a row of the corpus that could not be read."""


@dataclass(frozen=True)
class Manifest:
    """Lines in our form at `path`; relative paths in them, and errors about them, are those of `place`."""

    path: str
    place: str


def find_manifests(
    name: str, source: SourceConfig, remote: Remote, num_workers: int = 0, key: str = "data.sources"
) -> list[Manifest]:
    """The manifests of a source, written into the cache where it has another form.

    Raises:
        FileNotFoundError: a path that names nothing.
        ConfigError: an unknown form; a column that the corpus does not have.
    """
    corpus = open_corpus(name, source, remote, key)
    if num_workers > 0 and corpus.num_shards > 1 and corpus.kind is not SourceFormat.manifest:
        with processes(num_workers) as pool:
            work = in_order(pool, partial(_manifest, corpus), range(corpus.num_shards), ahead=4 * num_workers)
            return [made for _, made in tqdm(work, total=corpus.num_shards, desc=f"reading {name}", disable=None)]
    return [_manifest(corpus, shard) for shard in range(corpus.num_shards)]


def good_examples(manifests: Iterable[Manifest]) -> Iterator[Example]:
    """The examples of manifests, bad lines left out."""
    for manifest in manifests:
        with open(manifest.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip() and unreadable(line) is None:
                    with suppress(ManifestError):
                        yield parse_line(line, manifest.place, number)


def unreadable(line: bytes) -> str | None:
    """Why a line of a manifest that was written here stands for no example, None if it does stand for one."""
    return str(json.loads(line)[ERROR_KEY]) if line.startswith(b'{"%s"' % ERROR_KEY.encode()) else None


def _manifest(corpus: Corpus, shard: int) -> Manifest:
    """The manifest of one shard."""
    local = corpus.local(shard)
    place = corpus.place(shard)
    as_it_is = corpus.kind is SourceFormat.manifest and corpus.is_ours and not local.endswith(".gz")
    if as_it_is and not _names_members(local):
        return Manifest(local, place)
    state = "".join(_stamp(path) for path in ([local] if os.path.isfile(local) else sorted(glob.glob(f"{local}/*"))))
    mapping = [sorted(corpus.columns.items()), sorted(corpus.constants.items())]
    parts = [VERSION, corpus.kind.value, mapping, corpus.name, os.path.abspath(local), state]
    path = Path(corpus.remote.cache_dir) / "manifests" / f"{text_hash(*map(str, parts))}.jsonl"
    if not path.exists():
        write_whole(path, _lines(corpus, shard, os.path.dirname(place)))
    return Manifest(str(path), place)


def _stamp(path: str) -> str:
    status = os.stat(path)
    return f"{os.path.basename(path)}/{status.st_size}/{status.st_mtime_ns};"


def _lines(corpus: Corpus, shard: int, folder: str) -> Iterator[str]:
    """The manifest of a shard; empty lines keep the lines' numbers those of the corpus's rows."""
    line = 0
    for number, row in corpus.rows(shard):
        record = _record(corpus, row, folder)
        yield "\n" * max(number - line - 1, 0) + json.dumps(record, ensure_ascii=False) + "\n"
        line = max(number, line + 1)


def _record(corpus: Corpus, row: dict[str, Any] | ManifestError, folder: str) -> dict[str, Any]:
    if isinstance(row, ManifestError):
        return {ERROR_KEY: str(row)}
    record = corpus.record(row)
    try:
        json.dumps(record)
    except TypeError as error:
        return {ERROR_KEY: f"a column that holds no plain value ({error})"}
    return _placed(record, folder) if corpus.kind is SourceFormat.manifest else record


def _names_members(file: str) -> bool:
    """Whether a manifest names members of tars without their places."""
    with open(file, "rb") as lines:
        return any(b".tar::" in line and not re.search(rb"\.tar::\d+\+\d+::", line) for line in lines)


def _placed(value: Any, folder: str) -> Any:
    """The same record with the place of every tar member, so that no worker has to look for it."""
    if isinstance(value, dict):
        return {key: _placed(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_placed(item, folder) for item in value]
    if not isinstance(value, str) or ".tar::" not in value or "://" in value or PLACED.fullmatch(value):
        return value
    tar, _, member = value.partition(".tar::")
    place = None
    with suppress(BlobError, OSError):  # whoever reads the member says what is wrong with its tar
        place = member_places(os.path.join(folder, f"{tar}.tar")).get(member)
    return value if place is None else TarMember(member, *place).placed(f"{tar}.tar")
