"""From a source of the recipe to manifests on disk, whatever the form that the corpus has.

Manifests of ours are taken as they are. Everything else is written down once, in our form, into the cache: one manifest
per file of the corpus, audio left where it is (slices of recordings, members of tars, cells of Arrow files).
"""

from __future__ import annotations

import json
import mmap
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
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.manifests.conversations import FOREIGN
from qwen2audio_train.data.manifests.corpus import Corpus, check_first_columns, open_corpus
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.manifests.manifest import parse_line, parse_record
from qwen2audio_train.data.manifests.tables import DELIMITERS, UTF16_MARKS, suffix_of
from qwen2audio_train.data.storage.blobs import PLACED, BlobError, TarMember, member_places
from qwen2audio_train.data.storage.files import locked, remembered, text_hash, write_whole
from qwen2audio_train.data.storage.parallel import in_order, processes
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.errors import writable

VERSION = 3
PLAIN = "plain"

ERROR_KEY = "__error__"
"""Key of a line that stands for a row of the corpus that could not be read: place, number and words of the error."""

UNPLACED = re.compile(rb"\.tar::(?!\d+\+\d+::)")
"""A member of a tar without its place."""
ID = re.compile(rb'"id"\s*:')


@dataclass(frozen=True)
class Manifest:
    """Lines in our form at `path`; relative paths in them, and errors about them, are those of `place`."""

    path: str
    place: str

    def lines(self) -> Iterator[tuple[int, Example | ManifestError]]:
        """The lines with their numbers; blank ones are passed over."""
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, self.example(line, number)
                    except ManifestError as error:
                        yield number, error

    def example(self, line: bytes, number: int) -> Example:
        """What line `number` stands for. Raises ManifestError."""
        if line.startswith(b'{"%s"' % ERROR_KEY.encode()):
            raise ManifestError(*json.loads(line)[ERROR_KEY])
        return parse_line(line, self.place, number)


def find_manifests(
    name: str, source: SourceConfig, remote: Remote, num_workers: int = 0, where: str | None = None
) -> list[Manifest]:
    """The manifests of a source, written into the cache where it has another form.

    Args:
        where: key of the source for errors; by default data.sources.<name>.

    Raises:
        FileNotFoundError: a path that names nothing.
        ConfigError: an unknown form; a column that the corpus does not have.
    """
    where = where or f"data.sources.{name}"
    corpus = open_corpus(name, source, remote, where)
    if corpus.hub:
        raise ConfigError(f"{where}.streaming: a stream has no manifests; unset streaming to index the source")
    check_first_columns(corpus, source.columns, where)
    if num_workers > 0 and corpus.num_shards > 1 and corpus.kind is not SourceFormat.manifest:
        with processes(num_workers) as pool:
            work = in_order(pool, partial(_manifest, corpus), range(corpus.num_shards), ahead=4 * num_workers)
            return [made for _, made in tqdm(work, total=corpus.num_shards, desc=f"reading {name}", disable=None)]
    return [_manifest(corpus, shard) for shard in range(corpus.num_shards)]


def good_examples(manifests: Iterable[Manifest]) -> Iterator[Example]:
    """The examples of manifests, bad lines left out."""
    for manifest in manifests:
        yield from (example for _, example in manifest.lines() if not isinstance(example, ManifestError))


def streamed_examples(corpus: Corpus) -> Iterator[Example]:
    """The examples of a corpus front to back, without a manifest on disk; bad rows left out."""
    for shard in range(corpus.num_shards):
        place = corpus.place(shard)
        for number, row, _ in corpus.rows_with_bytes(shard):
            if isinstance(row, dict):
                with suppress(ManifestError):
                    yield parse_record(corpus.record(row, place, number), place, number)


def _manifest(corpus: Corpus, shard: int) -> Manifest:
    """The manifest of one shard."""
    local = corpus.local(shard)
    place = corpus.place(shard)
    may_be_plain = corpus.kind is SourceFormat.manifest and corpus.is_ours and suffix_of(place) not in DELIMITERS
    if may_be_plain and remembered(local, corpus.remote.cache_dir, f"form/{VERSION}", _form_of) == PLAIN:
        return Manifest(local, place)
    mapping = [sorted(corpus.columns.items()), sorted(corpus.constants.items())]
    origin = corpus.arrows[shard] if corpus.arrows else corpus.labels
    state = [os.path.abspath(local), stamp_of(local), corpus.split, origin]
    parts = [VERSION, corpus.kind.value, mapping, corpus.name, *state]
    path = Path(corpus.remote.cache_dir) / "manifests" / f"{text_hash(*map(str, parts))}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):  # by one rank; the others read what it wrote
            if not path.exists():
                write_whole(path, _lines(corpus, shard, place))
    return Manifest(str(path), place)


def stamp_of(path: str) -> str:
    """Names the state of a file, or of all files in a folder: another one after every change."""
    files = sorted(Path(path).rglob("*")) if os.path.isdir(path) else [Path(path)]
    states = [(file, file.stat()) for file in files if file.is_file()]
    return "".join(f"{file.name}/{status.st_size}/{status.st_mtime_ns};" for file, status in states)


def _lines(corpus: Corpus, shard: int, place: str) -> Iterator[str]:
    """The manifest of a shard; empty lines keep the lines' numbers those of the corpus's rows."""
    line = 0
    for number, row in corpus.rows(shard):
        record = _record(corpus, row, place, number)
        yield "\n" * max(number - line - 1, 0) + record + "\n"
        line = max(number, line + 1)


def _record(corpus: Corpus, row: dict[str, Any] | ManifestError, place: str, number: int) -> str:
    """The line of a row; whatever is wrong with the row becomes the error that it stands for."""
    try:
        if isinstance(row, ManifestError):
            raise row
        record = corpus.record(row, place, number)
        if corpus.kind is SourceFormat.manifest:
            record = _placed(record, os.path.dirname(place))
        return writable(json.dumps(record, ensure_ascii=False, allow_nan=False))
    except ManifestError as error:
        told = error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = ManifestError(place, number, "", "plain values (text, numbers, lists, objects)", str(error))
    return json.dumps({ERROR_KEY: told.args}, ensure_ascii=False)


def _form_of(file: str) -> str:
    return PLAIN if _is_plain(file) else "another"


def _is_plain(file: str) -> bool:
    """Whether a file is a manifest as it stands: JSON Lines with ids, in our form, tar members with their places."""
    if file.lower().endswith(".gz"):
        return False
    with open(file, "rb") as lines:
        first = lines.readline()
        if first[:2] in UTF16_MARKS or first.lstrip().startswith(b"[") or (first.strip() and not ID.search(first)):
            return False
        if not first:
            return True
        with mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return FOREIGN.search(whole) is None and UNPLACED.search(whole) is None


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
