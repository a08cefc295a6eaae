"""Small things about files: hashes of what they hold, and one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

UNSETTLED_NS = 2 * 10**9
"""How old a change has to be before the times of a file are believed: some file systems keep whole seconds, FAT two."""


def text_hash(*parts: str) -> str:
    """Hash of a list of texts, the same on every machine and run."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def content_hash(path: str) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def remembered(path: str, cache_dir: str | Path, what: str, work: Callable[[str], str]) -> str:
    """`work(path)`, which reads a large file from end to end: done once for a state of the file, by one process.

    The state is its path, size, inode and times of change. A file that was changed just now is read each time: within
    the clock's grain it may change again and look the same.

    Args:
        what: names the work.
    """
    status = os.stat(path)
    state = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    if time.time_ns() - max(state[2:]) < UNSETTLED_NS:
        return work(path)
    place = Path(cache_dir) / "files" / text_hash(what, os.path.abspath(path), *map(str, state))
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.parent / "lock"):
            if not place.exists():
                write_whole(place, [work(path)])
    return place.read_text(encoding="utf-8")


def json_lines(path: str | Path) -> Iterator[Any]:
    """What the lines of a JSON Lines file hold; a line feed alone ends one, where `str.splitlines` breaks at U+2028."""
    with open(path, "rb") as file:
        yield from (json.loads(line) for line in file if line.strip())


def write_bytes(path: Path, contents: bytes) -> None:
    """Write a file whose name says what it holds, in one go, unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_bytes(contents)
        os.replace(part, path)


def write_whole(path: Path, lines: Iterable[str]) -> None:
    """Write a file in one go: it is there whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(part, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time behind a lock file; the lock goes with the process that holds it."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
