"""What the commands of launch/data.py read: manifests and corpora in any form, through the reader that training has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import Example
from qwen2audio_train.data.manifests.cache import Manifest, find_manifests
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.storage.remote import Remote

OWN_ID = "an id of its own"
"""What is expected of an id that stood before."""


def named_sources(manifests: Sequence[str], sources: Mapping[str, SourceConfig]) -> dict[str, SourceConfig]:
    """Each of `manifests` as a source, called as its file is (by its whole path where two share a name), and `sources`.

    Raises:
        ConfigError: there are none.
    """
    stems = Counter(Path(path).stem for path in manifests)
    named = {path if stems[Path(path).stem] > 1 else Path(path).stem: SourceConfig([path]) for path in manifests}
    named |= sources
    if not named:
        raise ConfigError("manifests: no value was given; set manifests=[train.jsonl] or sources.<name>.path=[...]")
    return named


def open_manifests(path: str, cache_dir: str, key: str = "manifests") -> list[Manifest]:
    """The manifests that one path names: a file, a glob, a folder, a URL, a corpus that says itself what it is.

    Raises:
        FileNotFoundError: it names nothing.
        ConfigError: a form that cannot be told by its looks.
    """
    return find_manifests(Path(path).stem, SourceConfig([path]), Remote(cache_dir), where=key)


def examples_of(manifests: Sequence[Manifest]) -> Iterator[tuple[Manifest, int, Example | ManifestError]]:
    """Every line of some manifests: which manifest, its number in the corpus, and what it stands for.

    An id that stood before, in any of the manifests, is an error that comes before its example; a source without a
    line is one as well.
    """
    first: dict[str, tuple[Manifest, int]] = {}
    is_empty = True
    for manifest in manifests:
        for number, found in manifest.lines():
            is_empty = False
            if isinstance(found, ManifestError):
                yield manifest, number, found
                continue
            before = first.setdefault(found.id, (manifest, number))
            if before != (manifest, number):
                there = "" if before[0] is manifest else f" of {before[0].place}"
                told = f'"{found.id}", as in line {before[1]}{there}'
                yield manifest, number, ManifestError(manifest.place, number, "id", OWN_ID, told)
            yield manifest, number, found
    if is_empty and manifests:
        place = manifests[0].place
        yield manifests[0], 1, ManifestError(place, 1, "", "one JSON object per line", "an empty file")
