"""What the paths of a recipe name: braces and globs, on disk and afar."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence

BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


def expand_paths(patterns: Sequence[str], where: str) -> list[str]:
    """Files and folders that the patterns name, in order: braces ({000..012}, {a,b}) and globs expand.

    Raises:
        FileNotFoundError: a pattern names nothing.
    """
    files: list[str] = []
    for pattern in (plain for given in patterns for plain in expand_braces(os.path.expanduser(given))):
        if "://" in pattern and "*" not in pattern:
            files.append(pattern)
            continue
        found = _remote_glob(pattern) if "://" in pattern else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise FileNotFoundError(f"{where}: no file {pattern!r} (looked in {os.getcwd()})")
        files += found
    if not files:
        raise FileNotFoundError(f"{where}: no files given")
    return files


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

    filesystem, path = fsspec.core.url_to_fs(pattern)
    return [filesystem.unstrip_protocol(item) for item in sorted(filesystem.glob(path))]
