"""Files that are told by their first bytes to be no audio, or of a form that nothing here reads, and what to do."""

from __future__ import annotations

HEAD = 512
"""Bytes of a file by which it is told."""

NO_AUDIO = (
    (b"version https://git-lfs", "is a git-lfs pointer and not the file itself: run `git lfs pull` where it came from"),
    (b"<", "is a web page or XML (a download that went wrong?), not audio: fetch the file again"),
    (b"{", "is JSON, not audio: is the path that of a manifest, or an error message that was saved?"),
    (b"[", "is JSON, not audio: is the path that of a manifest, or an error message that was saved?"),
    (b"#EXTM3U", "is a playlist, not audio: `ffmpeg -i URL OUT.flac` fetches what it lists"),
    (b"PK\x03\x04", "is a zip archive: unpack it, or put the files into a .tar"),
    (b"\x1f\x8b", "is compressed with gzip: unpack it"),
    (b"BZh", "is compressed with bzip2: unpack it"),
    (b"\xfd7zXZ", "is compressed with xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it, or put the files into a .tar"),
    (b"Rar!", "is a RAR archive: unpack it, or put the files into a .tar"),
    (b"%PDF", "is a PDF document, not audio"),
    (b"\x89PNG", "is an image, not audio"),
    (b"\xff\xd8\xff", "is an image, not audio"),
    (b"MThd", "is MIDI, notes without sound: render it to audio first"),
    (b"\x93NUMPY", "is a NumPy array, not audio: write it with soundfile.write"),
    (b"PAR1", "is Parquet, not audio: name it as a source, see docs/data.md"),
)

FOREIGN = (
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMA (ASF)"),
    (0, b"#!AMR", "AMR"),
    (0, b"\x0b\x77", "AC-3"),
    (0, b"\x7f\xfe\x80\x01", "DTS"),
    (0, b"wvpk", "WavPack"),
    (0, b"TTA1", "True Audio"),
    (0, b"MAC ", "Monkey's Audio"),
    (0, b"MPCK", "Musepack"),
    (0, b"MP+", "Musepack"),
    (0, b"ajkg", "Shorten"),
    (0, b"DSD ", "DSD"),
    (0, b"FRM8", "DSD"),
    (0, b".RMF", "RealMedia"),
    (0, b".ra\xfd", "RealAudio"),
    (0, b"FLV\1", "Flash video"),
    (0, b"\xc0\xde\xc2", "Codec 2"),
    (8, b"AVI ", "AVI"),
    (28, b"Speex   ", "Speex"),
)
"""(Offset, bytes, name of the form)."""

TO_FLAC = "`ffmpeg -i IN OUT.flac` makes FLAC of it"
TS_PACKET = 188


def why_not(head: bytes) -> str | None:
    """Why a file that begins with these bytes is refused, None if it may be read."""
    for beginning, reason in NO_AUDIO:
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(beginning):
            return reason
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") and 0 in head[2:4]:  # FF FE might begin a frame of MPEG audio
        return "is text in UTF-16, not audio"
    if head[257:262] == b"ustar":
        return "is a tar archive: name it as a source, see docs/data.md"
    name = next((name for place, magic, name in FOREIGN if head[place : place + len(magic)] == magic), None)
    if len(head) > TS_PACKET and head[0] == head[TS_PACKET] == 0x47:
        name = "an MPEG transport stream"
    return f"is {name}, which is not read here: {TO_FLAC}" if name else None
