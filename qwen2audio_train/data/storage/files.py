"""Small things about files: hashes of what they hold, and one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


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
