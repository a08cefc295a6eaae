"""Members of tars by place and by name, as tarfile sees them; damaged archives; cells of Arrow files."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest

from qwen2audio_train.data.storage.blobs import (
    BlobError,
    Place,
    Span,
    TarMember,
    container,
    list_members,
    member_places,
    read_inside,
)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path: Path, members: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_of_tarfile(tmp_path: Path, kind: str) -> None:
    long = "/".join(["folder" * 5] * (4 if kind == "ustar" else 9))
    members = {"a.txt": b"", f"{long}/ü.flac": b"x" * 1000, "b/c.wav": b"y" * 512}
    tar = write_tar(tmp_path / "a.tar", members, FORMATS[kind])
    with tarfile.open(tar) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive]
    with tar.open("rb") as file:
        found = list(list_members(file))
    assert [(m.name, m.offset, m.size) for m in found] == expected
    for member in found:
        assert read_inside(member.placed(str(tar)), 2000) == members[member.name]
        assert read_inside(f"{tar}::{member.name}", 2000) == members[member.name]


def test_a_member_is_a_file_of_its_own_without_reading_the_rest(tmp_path: Path) -> None:
    contents = random.Random(0).randbytes(3000)
    tar = write_tar(tmp_path / "a.tar", {"a": b"x" * 700, "b": contents, "c": b"y"})
    place = Place(str(tar), *member_places(str(tar))["b"])
    with Span(place, patch=(998, b"1234")) as file:
        mended = contents[:998] + b"1234" + contents[1002:]
        assert file.read() == mended
        for start, size in ((0, 5), (990, 9), (999, 2), (1000, 500), (2990, 100), (4000, 10)):
            file.seek(start)
            assert (file.read(size), file.tell()) == (mended[start : start + size], min(max(start, 3000), start + size))
        assert file.seek(-1, 2) == 2999
    with pytest.raises(BlobError, match="cut off"):
        Span(Place(str(tar), place.offset, 10**6))
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(BlobError, match="a folder, a pipe or a device"):
            Span(Place(str(path)))


def test_a_place_that_another_member_has_by_now_is_refused(tmp_path: Path) -> None:
    """Clips of one size, packed again in another order: else each would be heard under the other's name."""
    long = "x" * 120
    tar = write_tar(tmp_path / "a.tar", {"d/a": b"one", "b": b"two", long: b"six"})
    places = {name: TarMember(name, *place).placed(str(tar)) for name, place in member_places(str(tar)).items()}
    assert [read_inside(place, 10) for place in places.values()] == [b"one", b"two", b"six"]
    write_tar(tar, {"b": b"two", "d/a": b"one", long: b"six"})
    for name in ("d/a", "b"):
        with pytest.raises(BlobError, match="no such member at this place: it was written again"):
            read_inside(places[name], 10)
    assert read_inside(places[long], 10) == b"six"
    write_tar(tar, {"d/a": b"four", "b": b"two"})
    with pytest.raises(BlobError, match="it was written again"):
        read_inside(places["d/a"], 10)


def test_folders_and_links_are_no_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        folder, link = tarfile.TarInfo("d"), tarfile.TarInfo("l")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(folder)
        archive.addfile(link)
    assert member_places(str(tmp_path / "a.tar")) == {}


def test_wherever_an_archive_breaks_off_it_is_told(tmp_path: Path) -> None:
    """After the members before the break; tarfile takes half of these for a good end."""
    tar = write_tar(tmp_path / "a.tar", {f"{i}.txt": bytes([65 + i]) * 700 for i in range(3)})
    whole = tar.read_bytes()
    for cut in range(0, 3 * 1536 + 1, 100):
        tar.write_bytes(whole[:cut])
        names: list[str] = []
        with tar.open("rb") as file:
            members = list_members(file)
            with pytest.raises(BlobError, match="cut off"):
                names.extend(member.name for member in members)
        assert names == [f"{i}.txt" for i in range(3) if cut >= 1536 * i + 512]


def test_damaged_and_compressed_archives_are_told(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{i}.txt": b"abc" for i in range(3)})
    whole = tar.read_bytes()
    tar.write_bytes(gzip.compress(random.Random(0).randbytes(3000)))
    with pytest.raises(BlobError, match="no tar file, or a damaged or compressed one"):
        member_places(str(tar))
    tar.write_bytes(whole[:1024] + b"\xff" * 100 + whole[1124:])
    with pytest.raises(BlobError, match="damaged at byte 1024"):
        member_places(str(tar))
    with pytest.raises(BlobError, match="no such member"):
        read_inside(f"{write_tar(tmp_path / 'b.tar', {'a': b'1'})}::b", 10)
    with pytest.raises(BlobError, match="limit of 0 bytes"):
        read_inside(f"{tmp_path / 'b.tar'}::512+1::a", 0)
    with pytest.raises(BlobError, match="cut off"):
        read_inside(f"{tmp_path / 'b.tar'}::10000000+5::a", 10)
    with pytest.raises(BlobError, match="cannot be read"):
        read_inside(f"{tmp_path / 'c.tar'}::0+5::a", 10)


def test_an_archive_does_not_end_at_a_blanked_header(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", {f"{i}.txt": b"abc" for i in range(3)})
    whole = tar.read_bytes()
    tar.write_bytes(whole[:1024] + bytes(512) + whole[1536:])
    with pytest.raises(BlobError, match="damaged at byte 1024: empty blocks before its end"):
        member_places(str(tar))


def test_container() -> None:
    assert container("x/a.tar::0+5::b.tar::c") == "x/a.tar"
    assert container("https://h/a.tar::b/c.flac") == "https://h/a.tar"
    assert container("x/d.arrow::3/audio") == "x/d.arrow"
    assert container("x/a.wav") == "x/a.wav"
