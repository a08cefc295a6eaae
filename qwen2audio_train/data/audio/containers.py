"""What a file's container says of its length, held against the file: cut off, of unknown length, or no audio at all.

Decoders believe a header that promises more than is there, shorten what they say to what they find, or give up on the
sizes that a writer into a pipe leaves behind. So the container is read first: what is cut off is refused in words, and
where a size was never filled in, the header is mended before a decoder sees it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from qwen2audio_train.data.audio.flac import flac_patch
from qwen2audio_train.data.audio.foreign import HEAD, why_not
from qwen2audio_train.data.audio.raw import Bytes, FormatError, Patch, is_adts

UNKNOWN_32, UNKNOWN_64 = 0x7F000000, 2**62
"""Writers into pipes put sizes from here on: 0xFFFFFFFF (FFmpeg), 0x7FFFF000 (SoX, WAV), 0x7F000008 (SoX, AIFF)."""
TOLERANCE = 64
"""Bytes that a header may promise too many: some writers count the header (44) or chunk heads (8) into the data."""
LONGEST_PAGE = 65_307
W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"


class Form(NamedTuple):
    """Where a container's first chunk stands, layout of a chunk's head, padding, name of the one with the samples."""

    first: int
    head: str
    pad: int
    data: bytes
    unknown: int = UNKNOWN_32
    counts_head: bool = False


FORMS = {
    b"RIFF": Form(12, "<4sI", 2, b"data"),
    b"RF64": Form(12, "<4sI", 2, b"data"),
    b"BW64": Form(12, "<4sI", 2, b"data"),
    b"RIFX": Form(12, ">4sI", 2, b"data"),
    b"FORM": Form(12, ">4sI", 2, b"SSND"),
    b"caff": Form(8, ">4sq", 1, b"data", UNKNOWN_64),
    b"riff": Form(40, "<16sQ", 8, W64_DATA, UNKNOWN_64, counts_head=True),
}


class Data(NamedTuple):
    """Where the samples of a chunked file stand, what its header promises, and where it does so."""

    start: int
    promised: int
    field: int
    codec: int
    tolerance: int


@dataclass(frozen=True)
class Layout:
    """What was found: bytes of the header to mend, or the stretch that holds MP3 frames.

    `is_settled` where the container has told the length, and no decoder need be asked. `tags` are bytes in front that
    decoders do not skip; `is_ogg_flac` where FLAC has to be taken out of Ogg pages first.
    """

    patch: Patch | None = None
    mp3: tuple[int, int] | None = None
    is_settled: bool = True
    tags: int = 0
    is_ogg_flac: bool = False


def examine(file: Bytes, size: int) -> Layout:
    """Look through a file's container.

    Raises:
        FormatError: cut off, or no audio and it is known what instead.
    """
    file.seek(0)
    head = file.read(HEAD)
    if not head:
        raise FormatError("is empty (0 bytes): fetch or write it again")
    if reason := why_not(head):
        raise FormatError(reason)
    if head[:4] in FORMS:
        return _chunked(file, size, head[:4])
    if head[:4] == b".snd":
        start, promised = struct.unpack(">II", head[4:12])
        return _held_against(Data(start, promised, 8, 0, TOLERANCE), size, FORMS[b"FORM"], b".snd", b"")
    if head[:4] == b"OggS":
        _check_ogg(file, size)
        return Layout(is_ogg_flac=is_ogg_flac(head))
    if head[:8] == b"NIST_1A\n":
        _check_sphere(file, size)
        return Layout()
    if head[:4] == b"fLaC":
        patch = flac_patch(file, size, head)
        return Layout(patch, is_settled=patch is not None)
    if head[:3] == b"ID3" or is_mpeg(head):
        start = after_tags(file)
        file.seek(start)
        behind = file.read(4)
        if is_adts(behind) or (start and behind == b"OggS"):
            return Layout(tags=start)
        if is_mpeg(behind):
            return Layout(mp3=(start, size))
    if head[4:8] == b"ftyp":
        _check_mp4(file, size)
    return Layout(is_settled=False)


def is_mpeg(head: bytes) -> bool:
    """Whether these bytes begin with the header of an MPEG audio frame (layer I to III)."""
    return len(head) >= 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0


def after_tags(file: Bytes) -> int:
    """Where a file goes on after its ID3v2 tags."""
    start = 0
    while True:
        file.seek(start)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:10]) > 127:
            return start
        footer = 10 if head[5] & 0x10 else 0
        start += 10 + sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)) + footer


def _chunked(file: Bytes, size: int, magic: bytes) -> Layout:
    form = FORMS[magic]
    head_size, place = struct.calcsize(form.head), form.first
    codec, tolerance, long_size, long_field = 0, TOLERANCE, None, 0
    while place + head_size <= size:
        file.seek(place)
        name, promised = struct.unpack(form.head, file.read(head_size))
        body = file.read(32)
        if name == form.data:
            if promised == 0xFFFFFFFF and long_size is not None:
                rest = size - place - head_size
                if not long_size and rest:
                    return Layout((long_field, rest.to_bytes(8, "little")))
                promised = long_size
            promised -= head_size if form.counts_head and 0 < promised < form.unknown else 0
            field = place + head_size - struct.calcsize(form.head[0] + form.head[-1])
            found = Data(place + head_size, promised, field, codec, tolerance)
            return _held_against(found, size, form, magic, body)
        if name == b"fmt " and len(body) >= 16:
            codec, align = struct.unpack(form.head[0] + "H10xH", body[:14])
            tolerance = max(TOLERANCE, align)
        elif name == b"ds64" and len(body) >= 16:
            long_size, long_field = int.from_bytes(body[8:16], "little"), place + head_size + 8
        step = promised if form.counts_head else head_size + promised
        if step < head_size:
            break
        place += -(-step // form.pad) * form.pad
    return Layout()


def _held_against(data: Data, size: int, form: Form, magic: bytes, body: bytes) -> Layout:
    """The promised size held against the file's: as it is, mended where it was never filled in, or refused."""
    rest = size - data.start
    if magic in body[:12]:
        raise FormatError("has its header twice, as SoX writes it into a pipe: write it to a file, or as .wav")
    promised, patch = data.promised, None
    if promised < 0 or (promised == 0 and rest > 0 and not _is_another_chunk(body, form)):
        width = struct.calcsize("<" + form.head[-1])
        order = "big" if form.head[0] == ">" else "little"
        told = rest + (24 if form.counts_head else 0)
        patch = data.field, min(told, 256**width - 1).to_bytes(width, order)
        promised = rest
    elif promised < form.unknown and promised - rest > data.tolerance:
        raise FormatError(_cut_off(promised, rest))
    if data.codec == 0x55:  # MP3 inside of WAV
        return Layout(mp3=(data.start, data.start + min(promised, rest)))
    return Layout(patch)


def _is_another_chunk(body: bytes, form: Form) -> bool:
    """Whether what follows an empty chunk of samples is the next chunk, so that it is really empty."""
    return (body[:4].isalnum() and body[:4].isascii()) or body[:4] == b"id3 "


def _check_ogg(file: Bytes, size: int) -> None:
    """Raises FormatError unless the last page is whole and marked as the stream's end."""
    first = _first_streams(file)
    file.seek(max(0, size - 2 * LONGEST_PAGE))
    tail = file.read(2 * LONGEST_PAGE)
    place = tail.rfind(b"OggS")
    page = tail[place:]
    num_segments = page[26] if len(page) > 26 else 255
    if len(page) < 27 + num_segments + sum(page[27 : 27 + num_segments]):
        raise FormatError("is cut off: its last Ogg page is not whole; fetch or write the file again")
    if not page[5] & 4:
        raise FormatError(
            "lacks Ogg's end-of-stream mark, so it is cut off or its writer never finished; "
            "if it is whole, `ffmpeg -i IN -c copy OUT` puts the mark in"
        )
    if page[14:18] not in first:
        raise FormatError("holds several Ogg streams one after the other: make one of them, `ffmpeg -i IN OUT.flac`")


def _first_streams(file: Bytes) -> set[bytes]:
    """Serial numbers of the streams that begin where the file begins."""
    found: set[bytes] = set()
    place = 0
    while True:
        file.seek(place)
        page = file.read(27 + 255)
        if page[:4] != b"OggS" or len(page) < 28 or not page[5] & 2:
            return found
        found.add(page[14:18])
        place += 27 + page[26] + sum(page[27 : 27 + page[26]])


def is_ogg_flac(head: bytes) -> bool:
    """Whether these bytes begin an Ogg file of FLAC (xiph.org/flac/ogg_mapping.html)."""
    return head[28:33] == b"\x7fFLAC"


def flac_of_ogg(data: bytes) -> bytes:
    """The FLAC file that an Ogg file holds: what its packets carry, end to end."""
    found, place = bytearray(), 0
    while data[place : place + 4] == b"OggS":
        start = place + 27 + data[place + 26]
        place = start + sum(data[place + 27 : start])
        found += data[start:place]
    return bytes(found[9:])  # in front stand 0x7F, "FLAC", the version and the number of headers


def _check_sphere(file: Bytes, size: int) -> None:
    """Raises FormatError where a NIST SPHERE file has fewer samples than its header, in lines of text, counts."""
    file.seek(0)
    lines = file.read(1024).split(b"\n")
    told = {words[0]: words[2] for line in lines if len(words := line.split()) == 3}
    values = [
        told.get(b"sample_count"),
        told.get(b"channel_count", b"1"),
        told.get(b"sample_n_bytes"),
        lines[1].strip(),
    ]
    if all(value and value.isdigit() for value in values) and told.get(b"sample_coding", b"pcm") in (b"pcm", b"ulaw"):
        count, channels, width, start = (int(value) for value in values if value)
        promised, rest = count * channels * width, size - start
        if promised - rest > TOLERANCE:
            raise FormatError(_cut_off(promised, rest))


def _cut_off(promised: int, rest: int) -> str:
    return (
        f"is cut off: its header promises {promised} bytes of audio and {max(rest, 0)} are there; "
        "fetch or write the file again"
    )


def _check_mp4(file: Bytes, size: int) -> None:
    place = 0
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: to the end of the file
            return
        place += length
    if place > size + TOLERANCE:
        raise FormatError(f"is cut off: its boxes reach to byte {place}, and it has {size}; fetch the file again")
