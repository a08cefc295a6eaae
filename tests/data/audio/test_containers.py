"""Lengths that a header guesses, leaves open or promises without keeping: the true one, or a refusal in words."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen2audio_train.data.audio.containers import examine
from qwen2audio_train.data.audio.decode import clip_duration, load_audio, probe
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.audio.mp3 import find_frames
from qwen2audio_train.data.examples import Clip

SECONDS = 3.0
FORMS = {
    "wav": ("WAV", "PCM_16"),
    "rifx.wav": ("WAV", "PCM_16"),
    "rf64.wav": ("RF64", "PCM_16"),
    "adpcm.wav": ("WAV", "MS_ADPCM"),
    "aiff": ("AIFF", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "sph": ("NIST", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def voice(seconds: float = SECONDS, rate: int = 16_000) -> np.ndarray:
    """A tone that comes and goes over some noise, so that variable bit rates vary."""
    times = np.arange(round(seconds * rate)) / rate
    loud = (np.sin(2 * np.pi * 0.7 * times) > -0.3) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * times))
    noise = np.random.default_rng(0).normal(size=len(times))
    return loud * (0.3 * np.sin(2 * np.pi * 300 * times) + 0.05 * noise)


def written(form: str, samples: np.ndarray | None = None, rate: int = 16_000) -> bytes:
    format, subtype = FORMS[form]
    out = io.BytesIO()
    endian = "BIG" if form == "rifx.wav" else None
    soundfile.write(out, voice() if samples is None else samples, rate, subtype, endian, format)
    return out.getvalue()


def lengths(data: bytes) -> set[float]:
    """What each of the three ways says, to a tenth of a millisecond."""
    clip = Clip("a.x", None)
    said = (clip_duration(clip, data), probe("a.x", data).duration_s, len(load_audio(clip, data)) / 16_000)
    return {round(seconds, 4) for seconds in said}


@pytest.mark.parametrize("form", FORMS)
def test_half_a_file_is_refused_by_whoever_opens_it(form: str) -> None:
    whole = written(form)
    (seconds,) = lengths(whole)
    assert seconds == pytest.approx(SECONDS, abs=0.08)
    for share in (0.3, 0.5, 0.9, 0.97):
        data = whole[: int(len(whole) * share)]
        for read in (load_audio, clip_duration):
            with pytest.raises(AudioError, match=r"cut off|end-of-stream mark|cannot be decoded|header promises"):
                read(Clip("a.x", None), data)
        with pytest.raises(AudioError):
            probe("a.x", data)
    if form not in ("mp3", "opus", "ogg", "w64", "sph"):  # what stands after the samples is no matter
        assert lengths(whole + b"junk" * 9) == {seconds}


def test_flac_in_ogg_as_ffmpeg_writes_it(tmp_path: Path) -> None:
    """Pages are laid around a FLAC file by hand: a packet of the header, one of the comment, then the frames."""
    flac = written("flac")
    first = 42
    packets = [b"\x7fFLAC\1\0\0\1" + flac[:first], *(flac[at : at + 20_000] for at in range(first, len(flac), 20_000))]

    def page(number: int, packet: bytes) -> bytes:
        lacing = bytes([255] * (len(packet) // 255) + [len(packet) % 255])
        flags = 2 * (number == 0) + 4 * (number == len(packets) - 1)
        return b"OggS\0" + struct.pack("<BqIII", flags, 0, 7, number, 0) + bytes([len(lacing)]) + lacing + packet

    ogg = b"".join(page(number, packet) for number, packet in enumerate(packets))
    assert lengths(ogg) == {SECONDS}
    assert np.array_equal(load_audio(Clip("a.ogg", None), ogg), load_audio(Clip("a.flac", None), flac))
    path = tmp_path / "a.ogg"
    path.write_bytes(ogg)
    part = load_audio(Clip(str(path), None, 1.0, 2.0))
    assert np.array_equal(part, load_audio(Clip("a.flac", None, 1.0, 2.0), flac))
    with pytest.raises(AudioError, match="is cut off"):
        load_audio(Clip("a.ogg", None), ogg[: len(ogg) // 2])


def test_an_rf64_whose_size_was_never_filled_in_is_read_to_its_end() -> None:
    data = written("rf64.wav")
    place = data.index(b"ds64") + 16
    assert lengths(data[:place] + bytes(8) + data[place + 8 :]) == {SECONDS}


def test_tags_in_front_of_ogg_are_passed_over() -> None:
    assert lengths(b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + written("ogg")) == lengths(written("ogg"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", r"is WMA \(ASF\), which is not read here: `ffmpeg"),
        (b"#!AMR\n", "is AMR, which"),
        (b"OggS" + bytes(24) + b"Speex   ", "is Speex, which"),
        (b"RIFF\0\0\0\0AVI LIST", "is AVI, which"),
        ((b"G" + bytes(187)) * 3, "is an MPEG transport stream, which"),
        ("hello".encode("utf-16"), "is text in UTF-16"),
        (b"#EXTM3U\n", "is a playlist"),
        (b"\x89PNG", "is an image"),
        (bytes(257) + b"ustar" + bytes(250), "is a tar archive: name it as a source"),
    ],
)
def test_what_is_not_read_is_named(data: bytes, says: str) -> None:
    with pytest.raises(AudioError, match=says):
        load_audio(Clip("a.wav", None), data.ljust(40, b"\0"))


def test_mp3_that_goes_on_at_another_rate_is_refused_and_junk_is_not() -> None:
    one, other = written("mp3"), written("mp3", voice(rate=32_000), 32_000)
    with pytest.raises(AudioError, match="goes on at another sampling rate after 3"):
        load_audio(Clip("a.mp3", None), one + other)
    found = find_frames(one)
    middle = int(found.starts[len(found.starts) // 2])
    junk = one[:middle] + np.random.default_rng(0).bytes(5_000).replace(b"\xff", b"\0") + one[middle:]
    assert np.array_equal(load_audio(Clip("a.mp3", None), junk), load_audio(Clip("a.mp3", None), one))


def data_field(data: bytes) -> int:
    return data.index(b"data") + 4


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000, 0xFFFFFFDA])
def test_a_wav_whose_size_was_never_filled_in_is_read_to_its_end(size: int) -> None:
    whole = written("wav")
    place = data_field(whole)
    opened = whole[:4] + struct.pack("<I", size) + whole[8:place] + struct.pack("<I", size) + whole[place + 4 :]
    assert lengths(opened) == {SECONDS}
    np.testing.assert_array_equal(load_audio(Clip("a", None), opened), load_audio(Clip("a", None), whole))
    np.testing.assert_array_equal(
        load_audio(Clip("a", None, 1.0, 2.0), opened), load_audio(Clip("a", None), whole)[16_000:32_000]
    )


def test_an_empty_wav_before_another_chunk_is_empty() -> None:
    empty = written("wav", np.zeros(0)) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    with pytest.raises(AudioError, match="holds no samples"):
        load_audio(Clip("a", None), empty)


def test_headers_counted_into_the_data_are_no_loss() -> None:
    """Writers that count 44 bytes of header into the samples."""
    whole = written("wav")
    place = data_field(whole)
    more = struct.pack("<I", len(whole) - place - 4 + 44)
    assert lengths(whole[:place] + more + whole[place + 4 :]) == {SECONDS}


def test_a_flac_that_does_not_tell_its_length(tmp_path: Path) -> None:
    """As FFmpeg writes it into a pipe: the last frame knows."""
    whole = written("flac")
    unknown = whole[:21] + bytes([whole[21] & 0xF0, 0, 0, 0, 0]) + whole[26:]
    assert lengths(unknown) == {SECONDS}
    assert lengths(unknown + b"TAG" + bytes(125)) == {SECONDS}
    (tmp_path / "a.flac").write_bytes(unknown)
    path = str(tmp_path / "a.flac")
    expected = load_audio(Clip("a", None), whole)
    np.testing.assert_array_equal(load_audio(Clip(path, None)), expected)
    np.testing.assert_array_equal(load_audio(Clip(path, None, 1.5, 2.25)), expected[24_000:36_000])
    for cut in (len(unknown) - 1, len(unknown) - 3_000, len(unknown) // 2):
        with pytest.raises(AudioError, match="cut off"):
            load_audio(Clip("a", None), unknown[:cut])


def test_an_ogg_without_an_end_or_with_several_streams() -> None:
    whole = written("ogg")
    last = whole.rindex(b"OggS")
    with pytest.raises(AudioError, match=r"end-of-stream mark.*ffmpeg"):
        load_audio(Clip("a", None), whole[:last])
    with pytest.raises(AudioError, match="several Ogg streams"):
        load_audio(Clip("a", None), whole + written("ogg", voice(1.0)))


def frames_of(mp3: bytes) -> list[bytes]:
    layout = examine(io.BytesIO(mp3), len(mp3))
    assert layout.mp3 is not None
    starts = find_frames(mp3[slice(*layout.mp3)], layout.mp3[0]).starts
    return [mp3[start:stop] for start, stop in pairwise(starts)]


def id3(size: int) -> bytes:
    sizes = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + sizes + np.random.default_rng(0).bytes(size)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_mp3_without_a_header_that_counts(rate: int) -> None:
    """Without the Xing frame (pipes, recorders), after tags and art, before a tag, joined midway."""
    whole = written("mp3", voice(6.0, rate), rate)
    frames = frames_of(whole)
    samples = 576 if rate == 16_000 else 1152
    bare = b"".join(frames)
    seconds = round(len(frames) * samples / rate, 4)
    for data in (bare, id3(300_000) + bare, bare + b"TAG" + bytes(125), id3(45) + id3(7) + bare):
        found = lengths(data)
        assert all(abs(length - seconds) < 2e-4 for length in found), found
    assert abs(len(load_audio(Clip("a", None), whole)) - 96_000) <= 1
    joined = bare[len(frames[0]) + 10 :]
    assert clip_duration(Clip("a", None), joined) == pytest.approx((len(frames) - 2) * samples / rate)
    waveform = load_audio(Clip("a", None), bare)
    for there in (len(frames[-1]) - 1, len(frames[-1]) // 2, 5, 3):  # FFmpeg makes a whole frame of a header and a byte
        cut = bare[: len(bare) - len(frames[-1]) + there]
        heard, number = load_audio(Clip("a", None), cut), len(frames) - (there < 4)
        assert abs(len(heard) - number * samples * 16_000 / rate) <= 1
        assert all(abs(length - number * samples / rate) < 2e-4 for length in lengths(cut))
        sure = (number - 3) * samples * 16_000 // rate
        np.testing.assert_array_equal(heard[:sure], waveform[:sure])
    with pytest.raises(AudioError, match="where its header promises"):
        load_audio(Clip("a", None), whole[: len(whole) * 6 // 10 + 7])


@pytest.mark.parametrize("has_header", [True, False])
def test_slices_of_mp3_are_those_of_the_whole(
    has_header: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = written("mp3", voice(12.0))
    (tmp_path / "a.mp3").write_bytes(whole if has_header else b"".join(frames_of(whole)))
    path = str(tmp_path / "a.mp3")
    expected = load_audio(Clip(path, None))
    for start, end in ((0.0, 0.3), (0.5, 3.0), (2.25, 2.75), (7.125, 11.0), (11.5, None)):
        first, last = round(start * 16_000), None if end is None else round(end * 16_000)
        np.testing.assert_allclose(load_audio(Clip(path, None, start, end)), expected[first:last], atol=1e-6)
    assert "error" not in capfd.readouterr().err  # mpg123 complains where a frame borrows from one that is not there


def test_mp3_inside_of_wav() -> None:
    frames = b"".join(frames_of(written("mp3")))
    about = struct.pack("<HHIIHHHHIHHH", 0x55, 1, 16_000, 3_000, 1, 0, 12, 1, 2, 144, 1, 1393)
    body = b"WAVEfmt " + struct.pack("<I", len(about)) + about + b"data" + struct.pack("<I", len(frames)) + frames
    found = lengths(b"RIFF" + struct.pack("<I", len(body)) + body)
    assert found == lengths(frames)


def test_a_file_without_a_name_in_utf8(tmp_path: Path) -> None:
    path = tmp_path / "f\udcfcr.wav"
    path.write_bytes(written("wav"))
    assert len(load_audio(Clip(str(path), None))) == 48_000
    assert len(load_audio(Clip(str(path), None, 1.0, 2.0))) == 16_000


def test_what_the_system_refuses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(written("wav"))

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(AudioError, match=re.escape(f"{path}: cannot be read (Permission denied)")):
        load_audio(Clip(str(path), None))


Tone = Callable[..., Path]


@pytest.mark.parametrize(
    ("start", "end", "says"),
    [
        (0.99, None, "0.010 s is too short"),
        (1.5, None, "is 1.000 s long: no slice from 1.5 s to its end"),
        (0.5, 2.0, "is 1.000 s long: no slice from 0.5 s to 2 s"),
    ],
)
def test_lengths_are_of_what_can_be_read(write_tone: Tone, start: float, end: float | None, says: str) -> None:
    clip = Clip(str(write_tone("a.wav")), None, start, end)
    for read in (clip_duration, load_audio):
        with pytest.raises(AudioError, match=re.escape(says)):
            read(clip)
