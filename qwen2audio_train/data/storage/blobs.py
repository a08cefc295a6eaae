"""Files inside of files: members of tar archives and cells of Arrow files, read in place.

    shards/a.tar::clips/x.flac               a member by its name; the archive's headers are read once per process
    shards/a.tar::1536+20480::clips/x.flac   the same with its place (offset + size), read without looking at headers
    corpus/data-00000.arrow::17/audio        row 17 of a column that holds {"bytes", "path"} or plain bytes

In front of any of them, and of a plain file, may stand a protocol that fsspec knows: https://, hf://, s3://...
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

from qwen2audio_train.errors import ExampleError

PLACED = re.compile(r"(?P<tar>.+?\.tar)::(?P<offset>\d+)\+(?P<size>\d+)::(?P<member>.+)", re.DOTALL)
CELL = re.compile(r"(?P<file>.+?\.arrow)::(?P<row>\d+)/(?P<column>.+)", re.DOTALL)


BLOCK = 512
LONGEST_NAME = 2**16
LONGEST_PLAIN_NAME = 100
"""Bytes that a header holds by itself."""


class BlobError(ExampleError):
    """A file inside of a file that cannot be read; says why."""


@dataclass(frozen=True)
class TarMember:
    """Where the bytes of a plain file stand in a tar archive."""

    name: str
    offset: int
    size: int

    def placed(self, tar: str) -> str:
        """Its path for a manifest."""
        return f"{tar}::{self.offset}+{self.size}::{self.name}"


@dataclass(frozen=True)
class Place:
    """A stretch of a local file: `size` bytes from `offset` on, or all that follows."""

    path: str
    offset: int = 0
    size: int | None = None

    @property
    def is_whole_file(self) -> bool:
        return self.offset == 0 and self.size is None

    def read(self, max_bytes: int) -> bytes:
        """All of it. Raises BlobError beyond `max_bytes`, OSError."""
        with Span(self) as file:
            if file.size > max_bytes:
                raise BlobError(f"is larger than the limit of {max_bytes} bytes")
            return file.read()


class Span(io.RawIOBase):
    """A stretch of a local file as a file of its own, without reading the rest.

    Args:
        patch: an offset in the stretch, and bytes that stand there instead of the file's.

    Raises:
        BlobError: no file, or the stretch reaches beyond its end.
        OSError: it cannot be opened.
    """

    def __init__(self, place: Place, patch: tuple[int, bytes] | None = None):
        self._fd = -1
        if "\0" in place.path:
            raise BlobError("a path cannot hold a zero byte")
        if not stat.S_ISREG(os.stat(place.path).st_mode):  # a pipe would never open
            raise BlobError("no such file: it is a folder, a pipe or a device")
        self._fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        length = os.fstat(self._fd).st_size
        self.offset, self.size = place.offset, length - place.offset if place.size is None else place.size
        if self.offset + self.size > length:
            raise BlobError(
                f"the tar file is cut off: it has {length} bytes, the member ends at {self.offset + self.size}"
            )
        self._patch, self._at = patch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        data = bytearray(min(size if size >= 0 else self.size, max(0, self.size - self._at)))
        return bytes(data[: self.readinto(data)])

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self.size - self._at)]
        number = os.preadv(self._fd, [view], self.offset + self._at) if view else 0
        if self._patch is not None:
            start, data = self._patch[0] - self._at, self._patch[1]
            first, last = max(start, 0), min(start + len(data), number)
            if first < last:
                view[first:last] = data[first - start : last - start]
        self._at += number
        return number

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()


def is_inside(path: str) -> bool:
    """Whether a path names a file inside of another file."""
    return ".tar::" in path or CELL.fullmatch(path) is not None


def container(path: str) -> str:
    """The file that a path names, or that it lies in."""
    match = CELL.fullmatch(path)
    return match["file"] if match else f"{path.partition('.tar::')[0]}.tar" if ".tar::" in path else path


def read_inside(path: str, max_bytes: int, local: str | None = None) -> bytes:
    """The bytes of a file inside of a local file (`local`: where the outer one really lies). Raises BlobError."""
    try:
        found = find_inside(path, max_bytes, local)
        return found if isinstance(found, bytes) else found.read(max_bytes)
    except OSError as error:
        raise BlobError(f"the tar file cannot be read ({error.strerror})") from error


def find_inside(path: str, max_bytes: int, local: str | None = None) -> bytes | Place:
    """Where a member of a local tar stands, or the bytes of a cell. Raises BlobError."""
    outer = local or container(path)
    if match := CELL.fullmatch(path):
        return _read_cell(outer, int(match["row"]), match["column"], max_bytes)
    if match := PLACED.fullmatch(path):
        place = Place(outer, int(match["offset"]), int(match["size"]))
        _check_member(place, match["member"])
        return place
    return Place(outer, *_find(outer, path.partition(".tar::")[2]))


def _check_member(place: Place, member: str) -> None:
    """Refuse a place that another member has by now: of clips of one size it would be heard under the wrong name.

    Raises:
        BlobError: the header in front of the place is that of another member, or none.
        OSError: the tar cannot be opened.
    """
    if len(member) > LONGEST_PLAIN_NAME or not member.isascii():
        return  # it stands elsewhere in the archive
    fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait
    try:
        header = os.pread(fd, BLOCK, place.offset - BLOCK) if place.offset >= BLOCK else bytes(BLOCK)
    finally:
        os.close(fd)
    if len(header) < BLOCK:
        return  # it is cut off, which is told where it is read
    size = header[124:136].strip(b" \0")
    if _name(header) != member.encode() or (size.isdigit() and int(size, 8) != place.size):
        raise BlobError(
            "the tar file has no such member at this place: it was written again since the manifest was; make the "
            "manifest anew (of one in data.cache_dir/manifests, touch what it was made of)"
        )


def list_members(file: IO[bytes]) -> Iterator[TarMember]:
    """Plain files of an uncompressed tar archive (ustar, GNU, pax), as they come.

    Unlike `tarfile`, which takes a damaged header for the archive's end, it tells where an archive breaks off.

    Raises:
        BlobError: no tar archive, compressed, damaged or cut off; after the members before the break.
    """
    offset = 0
    names: dict[bytes, bytes] = {}
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise BlobError(f"the tar file is cut off at byte {offset + len(header)}")
        if not any(header):
            if any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(2**20), b"")):
                raise BlobError(f"the tar file is damaged at byte {offset}: empty blocks before its end")
            return
        kind, size = header[156:157], _check(header, offset)
        data, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in b"xL":
            if size > LONGEST_NAME:
                raise BlobError(f"the tar file has a name of {size} bytes at byte {data}")
            names[kind] = file.read(size)
            continue
        record = _pax(names.get(b"x", b""))
        if kind in b"0\0007":
            raw = record.get(b"path") or names.get(b"L", b"").rstrip(b"\0") or _name(header)
            size = int(record[b"size"]) if record.get(b"size", b"").isdigit() else size
            offset = data + -(-size // BLOCK) * BLOCK
            yield TarMember(raw.decode("utf-8", "surrogateescape"), data, size)
        names = {}


def _check(header: bytes, offset: int) -> int:
    """The size that a header holds. Raises BlobError where its checksum does not fit."""
    try:
        checksum = int(header[148:156].strip(b" \0") or b"0", 8)
        field = header[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        checksum, size = -1, 0
    if checksum != sum(header[:148]) + sum(b" " * 8) + sum(header[156:]) or size < 0:
        if offset == 0:
            raise BlobError("is no tar file, or a damaged or compressed one; only plain .tar is read")
        raise BlobError(f"the tar file is damaged at byte {offset}")
    return size


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    return prefix + b"/" + name if prefix and header[257:262] == b"ustar" and header[263:265] == b"00" else name


def _pax(data: bytes) -> dict[bytes, bytes]:
    """The records `<length> <key>=<value>` of a pax header."""
    records: dict[bytes, bytes] = {}
    while data:
        length = int(data.split(b" ", 1)[0]) if data[:1].isdigit() else 0
        key, equals, value = data[:length].partition(b" ")[2].partition(b"=")
        if not equals:
            raise BlobError("the tar file has a damaged pax header")
        records[key] = value[:-1]
        data = data[length:]
    return records


def _find(tar: str, member: str) -> tuple[int, int]:
    try:
        return member_places(tar)[member]
    except OSError as error:
        raise BlobError(f"the tar file cannot be read ({error.strerror})") from error
    except KeyError:
        raise BlobError("the tar file has no such member") from None


def member_places(tar: str) -> dict[str, tuple[int, int]]:
    """Offset and size of every member of a tar archive, by its name; listed once per process. Raises BlobError."""
    status = os.stat(tar)
    return _places(tar, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=32)
def _places(tar: str, size: int, modified_ns: int) -> dict[str, tuple[int, int]]:
    # size and time only tell versions of the tar apart
    with open(tar, "rb") as file:
        return {item.name: (item.offset, item.size) for item in list_members(file)}


def _read_cell(path: str, row: int, column: str, max_bytes: int) -> bytes:
    try:
        status = os.stat(path)
        value = _table(path, status.st_size, status.st_mtime_ns).column(column).slice(row, 1)[0].as_py()
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise BlobError(f"row {row}, column {column} of the Arrow file cannot be read ({error})") from error
    if isinstance(value, dict):
        value = value.get("bytes") or _beside(path, value.get("path"), max_bytes)
    if not isinstance(value, bytes):
        raise BlobError(f"row {row}, column {column} of the Arrow file holds no audio")
    if len(value) > max_bytes:
        raise BlobError(f"is larger than the limit of {max_bytes} bytes")
    return value


def _beside(arrow: str, path: str | None, max_bytes: int) -> bytes | None:
    if not path:
        return None
    try:
        return Place(os.path.join(os.path.dirname(arrow), path)).read(max_bytes)
    except OSError as error:
        raise BlobError(f"its audio file {path!r} cannot be read ({error.strerror})") from error


@lru_cache(maxsize=64)
def _table(path: str, size: int, modified_ns: int) -> Any:
    """The Arrow file as a memory-mapped table."""
    import pyarrow as pa  # slow to import, and only Arrow files need it

    with pa.memory_map(path) as file:
        return pa.ipc.open_stream(file).read_all()
