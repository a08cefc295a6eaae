"""What the paths of a recipe name: braces and globs, on disk and afar."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import quote

from qwen2audio_train.data.storage.blobs import BlobError

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


PROTOCOLS = ("file", "http", "https", "hf", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "cos", "memory")
"""What a path may begin with. fsspec knows more, among them some that read one file by what another one says."""


def check_url(url: str) -> None:
    """Look at a URL before it is opened, or said anywhere.

    Raises:
        BlobError: its protocol is none of `PROTOCOLS`, it chains several, or it holds a password (not repeated).
    """
    protocol, _, rest = url.partition("://")
    if protocol not in PROTOCOLS or "://" in rest.split("?")[0]:
        raise BlobError(f"{shown(url)}: cannot be fetched; expected one of {', '.join(PROTOCOLS)}, followed by ://")
    user, at, _ = (place := rest.split("/")[0]).rpartition("@")
    if at and (protocol in ("http", "https") or ":" in user):  # abfs://container@account holds no secret
        raise BlobError(
            f"{protocol}://...@{place.rpartition('@')[2]}: a URL must not hold a user or password, which would be "
            "written into logs and checkpoints; take s3://, hf:// and the like, whose clients read them from the "
            "environment"
        )


def shown(url: str) -> str:
    """A URL as it may be said: without the part after `?`, which may be a signature, and without a password."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        return url
    place, slash, path = rest.split("?")[0].partition("/")
    return f"{protocol}://{place.rpartition('@')[2]}{slash}{path}"


def expand_paths(patterns: Sequence[str], where: str) -> list[str]:
    """Files and folders that the patterns name, in order: braces ({000..012}, {a,b}) and globs expand.

    What exists under the very name that was given is meant, whatever braces and brackets are in the name.

    Raises:
        FileNotFoundError: a pattern names nothing.
        BlobError: a remote folder cannot be listed.
    """
    files: list[str] = []
    for pattern in (plain for given in patterns for plain in _plain(os.path.expanduser(given))):
        if "://" in pattern:
            check_url(pattern)
        if ("://" in pattern and "*" not in pattern) or os.path.exists(pattern):
            files.append(pattern)
            continue
        found = _remote_glob(pattern) if "://" in pattern else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise FileNotFoundError(f"{where}: no file {pattern!r} (looked in {os.getcwd()})")
        files += found
    if not files:
        raise FileNotFoundError(f"{where}: no files given")
    return files


def _plain(given: str) -> list[str]:
    return [given] if os.path.exists(given) else expand_braces(given)


def resolve(path: str, file: str) -> str:
    """The place of a path that stands in `file`: relative to that file's folder, be it local or a URL."""
    if "://" in path or os.path.isabs(path):
        return path if "://" in path else os.path.normpath(path)
    protocol, separator, rest = file.partition("://")
    if not separator:
        return os.path.normpath(os.path.join(_folder(file), path))
    if protocol in ("http", "https"):
        rest, path = rest.split("?")[0], quote(path)
    joined = os.path.normpath(os.path.join(os.path.dirname(rest), path))
    return f"{protocol}://{joined}"


_folder = lru_cache(os.path.dirname)  # every line of a manifest asks for that of the manifest


def relative_names(paths: Sequence[str]) -> list[str]:
    """Names that tell files apart: the last part of a path alone, more of them where two files share it."""
    for depth in range(1, max((path.count("/") for path in paths), default=0) + 2):
        names = ["/".join(path.rstrip("/").split("/")[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return list(paths)


def expand_braces(pattern: str) -> list[str]:
    """a{00..02}.tar -> a00.tar a01.tar a02.tar; x{b,c} -> xb xc."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        options = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        options = words.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [whole for option in options for whole in expand_braces(f"{head}{option}{tail}")]


def _remote_glob(pattern: str) -> list[str]:
    import fsspec  # slow to import, and most data is local

    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        return [filesystem.unstrip_protocol(item) for item in sorted(filesystem.glob(path))]
    except (OSError, ValueError, ImportError) as error:
        raise BlobError(f"{pattern}: its files cannot be listed ({error})") from error
