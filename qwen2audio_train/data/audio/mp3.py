"""MP3 by its frames: their number is the length, whatever a header guesses, and a slice is decoded by itself.

libsndfile (mpg123) takes the length from an Xing header, or guesses it from the first frame's bit rate. So the frames
are counted here, and what is asked for is handed to it with a header of our own in front that says how many there are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import soundfile
from numpy.typing import NDArray

from qwen2audio_train.data.audio.containers import is_mpeg
from qwen2audio_train.data.audio.foreign import TO_FLAC
from qwen2audio_train.data.audio.raw import Bytes, FormatError, Opened

BIT_RATES = {
    (True, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""kbit/s by (MPEG 1, layer bits: 3 = I, 1 = III) and the header's four bits, from 1 on."""
SAMPLING_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
"""By the header's version bits: MPEG 1, 2, 2.5."""
DECODER_DELAY = 529
"""Samples that every decoder is late; a LAME header counts its encoder's delay without them."""
PREROLL = 24
"""Frames decoded before a slice: a frame borrows up to 511 bytes of those before it (9 frames at the least bit rate)
and overlaps with one."""
MOST_LENDERS = 12
MOST_JUNK = 2**18
"""Bytes before the first frame that are looked through."""
SURE_FRAMES = 4
"""In a row, after junk, before it is believed that they are frames: two in a row occur in noise."""
LEAD = 2
"""Silent frames in front of those that are decoded."""


@dataclass(frozen=True)
class Frames:
    """The frames of a file.

    Attributes:
        starts: (n + 1,) where every frame begins, and where the last one ends or would if it were whole.
        stop: where the bytes end.
        header: the first frame's.
        skipped: samples before the first that counts: the encoder's delay, where the file tells it.
        frames: samples that count.
    """

    starts: NDArray[np.int64]
    stop: int
    header: bytes
    samplerate: int
    channels: int
    samples_per_frame: int
    skipped: int
    frames: int


class _Shape:
    """What all frames of a file share: sampling rate, samples per frame, and the size by the header's third byte."""

    def __init__(self, header: bytes):
        version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
        rates = SAMPLING_RATES.get(version, ())
        if layer == 0 or header[2] >> 2 & 3 >= len(rates):
            raise FormatError("has no MP3 frame where one is expected: is it damaged?")
        self.samplerate = rates[header[2] >> 2 & 3]
        self.samples = 384 if layer == 3 else 1152 if layer == 2 or version == 3 else 576
        self.rates, self.layer, self.rate_bits = BIT_RATES[version == 3, layer], layer, header[2] >> 2 & 3
        self.sizes = [self._size(byte) for byte in range(256)]
        mono = header[3] >> 6 == 3
        self.channels = 1 if mono else 2
        self.side_info = (17 if mono else 32) if version == 3 else (9 if mono else 17)

    def _size(self, byte: int) -> int:
        """Bytes of a frame, 0 for a header that does not belong to this file."""
        if byte >> 2 & 3 != self.rate_bits or not 0 < byte >> 4 < 15:
            return 0
        bits = self.rates[(byte >> 4) - 1] * 1000
        padding = byte >> 1 & 1
        if self.layer == 3:
            return (12 * bits // self.samplerate + padding) * 4
        return self.samples // 8 * bits // self.samplerate + padding


def find_frames(data: bytes, begin: int = 0) -> Frames:
    """The frames in `data`, which stands at byte `begin` of its file.

    A last one that is not whole counts, as it does for FFmpeg, and its missing bytes are zeros.

    Raises:
        FormatError: none, or fewer than the file's own header counts.
    """
    junk = 0 if is_mpeg(data[:4]) else _first_frame(data)
    if junk is None:
        raise FormatError("holds no MP3 frames")
    data, begin = data[junk:] if junk else data, begin + junk
    shape = _Shape(data[:4])
    starts, end = _walk(data, shape)
    header = bytes(data[starts[0] : starts[0] + 4])
    told, delay, padding = _told(data[starts[0] : starts[1] if len(starts) > 1 else end], shape)
    if told is not None:
        starts = starts[1:]
    if told and len(starts) < told:
        lasts, promised = (n * shape.samples / shape.samplerate for n in (len(starts), told))
        raise FormatError(
            f"ends after {lasts:.3f} s where its header promises {promised:.3f} s: it is cut off or damaged"
        )
    samples = len(starts) * shape.samples
    skipped = min(delay + DECODER_DELAY, samples) if delay or padding else 0
    cut = max(0, padding - DECODER_DELAY) if len(starts) == told else 0
    places = np.array([*starts, end], np.int64) + begin
    counted = max(0, samples - skipped - cut)
    return Frames(places, begin + len(data), header, shape.samplerate, shape.channels, shape.samples, skipped, counted)


def begins_midway(data: bytes) -> bool:
    """Whether frames follow after what a stream that was joined midway begins with."""
    return _first_frame(data) is not None


def _first_frame(data: bytes) -> int | None:
    """Where several frames in a row begin; None if they do not."""
    place = -1
    while 0 <= (place := data.find(b"\xff", place + 1)) < min(len(data) - 4, MOST_JUNK):
        if is_mpeg(data[place : place + 2]) and (data[place + 2] >> 2 & 3) != 3 and data[place + 1] >> 3 & 3 != 1:
            sizes, kind = _Shape(data[place : place + 4]).sizes, data[place + 1] & 0xFE
            if _frames_in_a_row(data, place, sizes, kind) >= SURE_FRAMES:
                return place
    return None


def _frames_in_a_row(data: bytes, place: int, sizes: list[int], kind: int) -> int:
    number = 0
    while number < SURE_FRAMES and place < len(data) - 4:
        size = sizes[data[place + 2]] if data[place] == 0xFF and data[place + 1] & 0xFE == kind else 0
        if not size:
            break
        number, place = number + 1, place + size
    return number


def _walk(data: bytes, shape: _Shape) -> tuple[list[int], int]:
    """Where the frames begin, and where the last one ends; what stands between frames is passed over."""
    sizes, kind = shape.sizes, data[1] & 0xFE
    starts: list[int] = []
    place, last = 0, len(data) - 4
    while place <= last:
        size = sizes[data[place + 2]] if data[place] == 0xFF and data[place + 1] & 0xFE == kind else 0
        if not size:
            junk, place = place, _next_frame(data, place + 1, sizes, kind)
            if _first_frame(data[junk:place]) is not None:
                lasts = len(starts) * shape.samples / shape.samplerate
                raise FormatError(f"goes on at another sampling rate after {lasts:.3f} s: {TO_FLAC}")
            continue
        starts.append(place)
        place += size
    if not starts:
        raise FormatError("holds no MP3 frames")
    return starts, starts[-1] + sizes[data[starts[-1] + 2]]


def _next_frame(data: bytes, place: int, sizes: list[int], kind: int) -> int:
    """Where two frames in a row (or one at the end) begin; the end of the data if there are none."""
    while 0 <= (place := data.find(b"\xff", place)) < len(data) - 4:
        size = sizes[data[place + 2]] if data[place + 1] & 0xFE == kind else 0
        after = place + size
        if size and (after == len(data) or (data[after : after + 1] == b"\xff" and data[after + 1] & 0xFE == kind)):
            return place
        place += 1
    return len(data)


def _told(frame: bytes, shape: _Shape) -> tuple[int | None, int, int]:
    """Number of frames after this one, encoder delay and padding: what an Xing, Info or VBRI header says.

    None if this is a frame of audio, 0 frames where the header leaves them out.
    """
    at = 4 + shape.side_info
    if frame[36:40] == b"VBRI":
        return int.from_bytes(frame[50:54], "big"), 0, 0
    if frame[at : at + 4] not in (b"Xing", b"Info"):
        return None, 0, 0
    flags = frame[at + 7]
    number = int.from_bytes(frame[at + 8 : at + 12], "big") if flags & 1 else 0
    lame = at + 8 + 4 * (flags & 1) + 2 * (flags & 2) + 25 * (flags & 4) + (flags & 8) // 2
    delays = int.from_bytes(frame[lame + 21 : lame + 24], "big") if frame[lame : lame + 1].strip(b"\0") else 0
    return number, delays >> 12, delays & 0xFFF


class Mp3File(Opened):
    """An MP3 by its frames."""

    def __init__(self, file: Bytes, frames: Frames):
        super().__init__(file, frames.samplerate, frames.channels, frames.frames)
        self._found = frames

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray:
        """(frames, channels) from the place that was sought; soundfile.LibsndfileError where frames are damaged."""
        found, start = self._found, self._found.skipped + self._place
        first = max(0, start // found.samples_per_frame - PREROLL)
        last = min(-(-(start + frames) // found.samples_per_frame), len(found.starts) - 1)
        self._place += frames
        lead, late = _lead(found.header, last - first)
        skipped = start - first * found.samples_per_frame + late
        fd = os.memfd_create("mp3")
        with open(fd, "w+b") as copy:
            copy.write(lead)
            copy.write(self._frames(first, last))
            copy.seek(0)
            with soundfile.SoundFile(os.dup(fd)) as decoder:
                return decoder.read(skipped + frames, dtype=dtype, always_2d=always_2d)[skipped:]

    def _frames(self, first: int, last: int) -> bytearray:
        """Frames first .. last - 1; those that borrow bytes of frames before `first` are made silent."""
        found = self._found
        begin, stop = int(found.starts[first]), int(found.starts[last])
        self._file.seek(begin)
        data = bytearray(self._file.read(min(stop, found.stop) - begin)).ljust(stop - begin, b"\0")
        places = [int(place) - begin for place in found.starts[first:last]]
        shape, lent = _Shape(found.header), 0
        for place in places[:MOST_LENDERS] if shape.layer == 1 else ():
            side, end = place + (4 if data[place + 1] & 1 else 6), place + shape.sizes[data[place + 2]]
            bits = 9 if found.samples_per_frame == 1152 else 8  # that say how many bytes are borrowed
            if int.from_bytes(data[side : side + 2], "big") >> 16 - bits > lent:
                all_there_are = min(lent, 2**bits - 1) << 16 - bits  # mpg123 hands on only what a frame borrows
                data[side : side + shape.side_info] = all_there_are.to_bytes(2, "big").ljust(shape.side_info, b"\0")
            lent += end - side - shape.side_info
        return bytearray().join(data[place : place + shape.sizes[data[place + 2]]] for place in places)  # without junk


def _lead(header: bytes, num_frames: int) -> tuple[bytes, int]:
    """Silent frames, the first of which tells a decoder how many follow, and how many samples it makes of them.

    mpg123 looks for the number in frames of 152 bytes and more, and then leaves out the first 529 samples. In layers I
    and II it does not look for one; their frames are all of one size, so that the length is not guessed wrong.
    """
    shape = _Shape(header)
    if shape.layer != 1:
        return b"", 0
    third = next(byte for n in range(1, 15) if shape.sizes[byte := n << 4 | header[2] & 0x0C] >= 200)
    silent = bytes((header[0], header[1] | 1, third, header[3])).ljust(shape.sizes[third], b"\0")
    told = b"Info" + (1).to_bytes(4, "big") + (num_frames + LEAD).to_bytes(4, "big")
    at = 4 + shape.side_info
    return silent[:at] + told + silent[at + 12 :] + LEAD * silent, LEAD * shape.samples - DECODER_DELAY
