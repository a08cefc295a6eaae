"""Remote files: read with retries, and whole shards kept in a local cache of bounded size.

http(s) goes through the standard library, where a stalled server is noticed (no byte for `timeout_s`) and a broken
transfer goes on where it stopped; every other protocol (hf, s3, gs...) goes through fsspec and its plug-in.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, TypeVar

from qwen2audio_train.data.storage.blobs import BlobError, Place, container, find_inside, is_inside
from qwen2audio_train.data.storage.files import locked, write_whole
from qwen2audio_train.data.storage.paths import check_url, shown
from qwen2audio_train.data.storage.remote_state import UNTOLD, State, is_another, told_by

Result = TypeVar("Result")

CHUNK = 2**20
FINAL_STATUS = range(400, 500)
"""Answers that asking again does not change, save for those in `TRANSIENT_STATUS`."""
TRANSIENT_STATUS = (408, 425, 429)
LOCAL = "file://"
EVICTIONS = 5
"""Times that a shard is fetched again because other processes have made room where it lay."""

_FAILED: dict[str, tuple[float, str]] = {}
"""When a shard could last not be had, or a host not be reached, and why; by place in the cache and by host."""


_STATES: dict[tuple[str, str], State] = {}
"""State of each table or tar, by cache and URL, as its server told it to this process."""


class RemoteError(BlobError):
    """A remote file that could not be had, after all retries."""


@dataclass(frozen=True)
class Remote:
    """How remote files are read; pickles, and is the same object to all workers of a machine through its folder.

    Args:
        cache_dir: folder of the shards.
        max_gib: bound of the cache; the shards that were used longest ago go first. A shard in use is never missed: it
            is fetched again.
        retries, backoff_s: after a failure wait backoff_s, then twice as long, and so on.
    """

    cache_dir: str = "data_cache"
    max_gib: float = 64.0
    retries: int = 5
    timeout_s: float = 30.0
    backoff_s: float = 0.5

    def read_clip(self, path: str, max_bytes: int) -> bytes | None:
        """The bytes of a clip's file, None if it is a plain local file. Raises BlobError."""
        if not is_inside(path) and "://" not in path:
            return None
        return self.reading(path, max_bytes, lambda s: s if isinstance(s, bytes) else s.read(max_bytes))

    def reading(
        self,
        path: str,
        max_bytes: int,
        work: Callable[[bytes | Place], Result],
        *,
        in_parts: bool = False,
        again: bool = False,
    ) -> Result:
        """What `work` makes of a clip's file, wherever it lies: handed over as bytes or as a stretch of a local file.

        Args:
            in_parts: slices of the file are asked for one by one, whatever its size.
            again: it will be asked for again, as a length is before the samples. Either way a remote file is fetched
                once, into the cache.

        Raises:
            BlobError: it cannot be had.
            OSError: a local file cannot be read.
        """
        outer = container(path)
        if "://" not in outer:
            return work(find_inside(path, max_bytes) if is_inside(path) else Place(path))
        is_whole = not is_inside(path) and not in_parts
        is_here = outer.startswith(LOCAL)
        if is_whole and not is_here and not again and not self._place(path).exists():
            return work(self.read(path, max_bytes))
        for _ in range(EVICTIONS):
            local = self.shard(outer, max_bytes if is_whole else None)
            try:
                return work(find_inside(path, max_bytes, local) if is_inside(path) else Place(local))
            except (BlobError, FileNotFoundError) as error:
                if is_here or not isinstance(error.__cause__ or error, FileNotFoundError):
                    raise
        raise RemoteError(f"was evicted {EVICTIONS} times before it could be read; raise data.cache_max_gib")

    def read(self, url: str, max_bytes: int) -> bytes:
        """A whole file into memory. Raises RemoteError."""
        data = BytesIO()
        self._download(url, data, max_bytes)
        return data.getvalue()

    def shard(self, url: str, max_bytes: int | None = None, state: str = "") -> str:
        """Path of the local copy of a file, fetched if it is not there; of `file://` the file itself.

        Raises:
            RemoteError: it cannot be had, or has over `max_bytes`; for the next `timeout_s` without asking again.
        """
        if url.startswith(LOCAL):
            plain = url.removeprefix(LOCAL)
            return plain if os.path.exists(plain) else urllib.parse.unquote(plain)
        place = self._place(url, state)
        self._refuse_if_failed(str(place))
        if not self._touch(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            with locked(_lock_of(place)):
                if not self._touch(place):
                    try:
                        self._fetch(url, place, max_bytes)
                    except RemoteError as error:
                        _FAILED[str(place)] = (time.monotonic(), f"{shown(url)}: {error}")
                        raise RemoteError(f"{shown(url)}: {error}") from error
        return str(place)

    def current(self, url: str) -> str:
        """`shard` of a manifest or table as the server has it now, beside older ones that other runs may be reading.

        Asked once in the life of a process; where a server does not answer, the copy that was the last to be current.
        """
        note, state = Path(f"{self._place(url)}.state"), self._state(url)
        if any(state):
            write_whole(note, [json.dumps(state)])
        return self.shard(url, state=note.read_text(encoding="utf-8") if note.exists() else "")

    def current_tar(self, url: str) -> str:
        """`shard` of a tar, if the server still has the one that was fetched: places in it are written down.

        Raises:
            RemoteError: the server has another by now.
        """
        if self._place(url).exists():
            self._refuse_another(url, self._state(url))
        return self.shard(url)

    def _refuse_another(self, url: str, state: State) -> None:
        note = Path(f"{self._place(url)}.first")
        if note.exists() and is_another(first := json.loads(note.read_text(encoding="utf-8")), state):
            told = ", ".join(f"{a} -> {b}" for a, b in zip(first, state, strict=True) if a and b and a != b)
            raise RemoteError(
                f"{shown(url)}: has changed on its server since it was fetched first ({told}): "
                f"to take the new one, delete {self._place(url)}* and make anew what names places in it"
            )

    def _state(self, url: str) -> State:
        """What a server tells of a file, asked once in the life of a process."""
        key = (self.cache_dir, url)
        if key not in _STATES:
            _STATES[key] = self._asked_state(url)
        return _STATES[key]

    def _asked_state(self, url: str) -> State:
        if url.startswith(LOCAL):
            return UNTOLD
        host = "//" + urllib.parse.urlsplit(url).netloc
        try:
            self._refuse_if_failed(host)
            if not url.startswith(("http://", "https://")):
                import fsspec  # slow to import, and most data is local

                filesystem, path = fsspec.core.url_to_fs(url)
                return [str(filesystem.ukey(path)), None, None]
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return told_by(response.headers)
        except (OSError, ValueError, ImportError, NotImplementedError, http.client.HTTPException) as error:
            if _is_of_host(error):
                _FAILED[host] = (time.monotonic(), f"cannot be reached ({error})")
            return UNTOLD

    def prefetch(self, url: str) -> Future[str]:
        """Fetch a shard in the background."""
        return _pool().submit(self.shard, url)

    def _place(self, url: str, state: str = "") -> Path:
        name = hashlib.blake2b((url + state).encode(), digest_size=12).hexdigest()
        return Path(self.cache_dir) / "shards" / f"{name}-{Path(url.split('?')[0]).name[-80:]}"

    def _touch(self, place: Path) -> bool:
        """Note that a copy is used, if it is there. Its own times stay, which the keys of other caches hold."""
        if not place.exists():
            return False
        _lock_of(place).touch()
        return True

    def _fetch(self, url: str, place: Path, max_bytes: int | None) -> None:
        part = place.with_name(f"{place.name}.part")
        with part.open("wb") as file:
            state = self._download(url, file, max_bytes)
        if place == self._place(url):
            try:
                self._refuse_another(url, state)
            except RemoteError:
                part.unlink()
                raise
            write_whole(Path(f"{place}.first"), [json.dumps(state)])
        self._make_room(part.stat().st_size, place.parent)
        os.replace(part, place)

    def _make_room(self, size: int, folder: Path) -> None:
        files = []
        for path in folder.iterdir():
            if path.suffix not in (".lock", ".part", ".state", ".first"):
                with suppress(FileNotFoundError):  # another process makes room as well
                    files.append((_lock_of(path).stat().st_mtime_ns, path, path.stat().st_size))
        excess = size + sum(size for *_, size in files) - self.max_gib * 2**30
        for _, path, freed in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= freed

    def _refuse_if_failed(self, what: str) -> None:
        """Raise what was raised for it a short while ago: else each example of it would wait for all the retries."""
        failed_at, reason = _FAILED.get(what, (-math.inf, ""))
        if time.monotonic() - failed_at < self.timeout_s:
            raise RemoteError(reason)

    def _download(self, url: str, file: IO[bytes], max_bytes: int | None) -> State:
        """Write a file; returns its state. A transfer that was broken off goes on, unless the file has changed."""
        states: list[State] = []

        def attempt() -> None:
            with self._opened(url, file.tell()) as (remote, end, state):
                if file.tell() and is_another(states[-1], state):
                    file.seek(0)
                    file.truncate()
                    raise ConnectionError("it changed on its server while it was fetched")
                states.append(state)
                while chunk := remote.read(CHUNK):
                    if max_bytes is not None and file.tell() + len(chunk) > max_bytes:
                        raise RemoteError(f"is larger than the limit of {max_bytes} bytes")
                    file.write(chunk)
            if end is not None and file.tell() < end:
                raise ConnectionError(f"the connection ended after {file.tell()} of {end} bytes")

        self._retried(url, attempt)
        return states[-1]

    def _retried(self, url: str, attempt: Callable[[], None]) -> None:
        check_url(url)
        host = "//" + urllib.parse.urlsplit(url).netloc
        self._refuse_if_failed(host)
        for number in range(self.retries + 1):
            try:
                attempt()
                return
            except (OSError, http.client.HTTPException) as error:
                if _is_final(error):
                    raise RemoteError(f"cannot be fetched ({error})") from error
                if number == self.retries:
                    reason = f"cannot be fetched after {number + 1} tries ({error or repr(error)})"
                    if _is_of_host(error):
                        _FAILED[host] = (time.monotonic(), reason)
                    raise RemoteError(reason) from error
                time.sleep(self.backoff_s * 2**number)

    @contextmanager
    def _opened(self, url: str, start: int) -> Iterator[tuple[IO[bytes], int | None, State]]:
        """The file from byte `start` on, its length where it is known, and its state."""
        if not url.startswith(("http://", "https://")):
            import fsspec  # slow to import, and most data is local

            try:
                opened = fsspec.open(url, "rb")
            except (ValueError, ImportError) as error:
                raise RemoteError(f"cannot be fetched ({error})") from error
            with opened as remote:
                remote.seek(start)
                yield remote, getattr(remote, "size", None), self._asked_state(url)
            return
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
            length = response.headers.get("Content-Length")
            resumed = start if response.status == http.client.PARTIAL_CONTENT else 0
            response.read(start - resumed)  # a server that does not resume sends what is already here once more
            yield response, None if length is None else resumed + int(length), told_by(response.headers)


def _lock_of(place: Path) -> Path:
    """The file that is locked while a copy is made, and touched when it is used."""
    return place.with_name(f"{place.name}.lock")


def _is_final(error: Exception) -> bool:
    if (status := _status(error)) is not None:
        return status in FINAL_STATUS and status not in TRANSIENT_STATUS
    is_told = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
    return is_told or type(error).__name__ == "OfflineModeIsEnabled"  # of huggingface_hub, which need not be loaded


def _is_of_host(error: Exception) -> bool:
    """Whether nothing of the host can be had, whatever the file."""
    is_unreached = isinstance(error, urllib.error.URLError | socket.gaierror | ConnectionRefusedError)
    return is_unreached and _status(error) is None


def _status(error: Exception) -> int | None:
    """The status that a server answered, as urllib or as requests (hf://) have it; None where none did."""
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, thread_name_prefix="prefetch")
