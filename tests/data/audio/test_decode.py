"""Reading audio: formats, slices, tar members, and every way in which a file can be bad."""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import soundfile
import torch

from qwen2audio_train.data.audio.decode import _whole_flac, clip_duration, load_audio, probe
from qwen2audio_train.data.audio.files import AudioError, AudioLimits
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.storage.blobs import Place
from qwen2audio_train.data.storage.remote import Remote

Tone = Callable[..., Path]


def clip(path: Path | str, start: float = 0.0, end: float | None = None) -> Clip:
    return Clip(str(path), None, start, end)


def tone(num_samples: int, level: float = 0.5, rate: int = 16_000) -> np.ndarray:
    return level * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("a.wav", 5e-5), ("a.flac", 5e-5), ("a.ogg", 0.05), ("a.mp3", 0.05)],
)
def test_formats(write_tone: Tone, name: str, tolerance: float) -> None:
    waveform = load_audio(clip(write_tone(name)))
    assert waveform.dtype == np.float32
    assert waveform.flags.c_contiguous
    assert abs(len(waveform) - 16_000) <= 1
    assert np.abs(waveform[2_000:14_000] - tone(16_000)[2_000:14_000]).max() < tolerance


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_the_tone(write_tone: Tone, rate: int) -> None:
    waveform = load_audio(clip(write_tone("a.wav", rate=rate)))
    assert len(waveform) == 16_000
    assert np.abs(waveform[1_000:15_000] - tone(16_000)[1_000:15_000]).max() < 1e-3


def test_channels(write_tone: Tone) -> None:
    path = write_tone("a.flac", channels=2)
    np.testing.assert_allclose(load_audio(clip(path)), tone(16_000, (0.5 + 0.25) / 2), atol=5e-5)
    np.testing.assert_allclose(load_audio(Clip(str(path), None, channel=1)), tone(16_000, 0.25), atol=5e-5)
    with pytest.raises(AudioError, match="no channel 2"):
        load_audio(Clip(str(path), None, channel=2))


class Decoder:
    """Stands for torchcodec's: one second of a tone at 8 kHz on two channels, 64 samples short of what it announces."""

    def __init__(self, source: bytes):
        self.metadata = SimpleNamespace(sample_rate=8_000, num_channels=2, duration_seconds_from_header=1.0)
        self._samples = torch.from_numpy(np.stack([tone(7_936, rate=8_000), tone(7_936, 0.25, 8_000)]))

    def get_samples_played_in_range(self, start: float, stop: float) -> SimpleNamespace:
        samples = self._samples[:, round(start * 8_000) : round(stop * 8_000)]
        return SimpleNamespace(data=samples, pts_seconds=start)


HEADS = [b"\0\0\0\0ftypM4A ", b"\xff\xf1\x60\x40\x15\xbf"]


@pytest.mark.parametrize("head", HEADS)
def test_media_files_need_an_extra_and_say_so(tmp_path: Path, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(head + bytes(500))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(AudioError, match=r"needs torchcodec and FFmpeg \(pip install 'qwen2audio-train\[media\]'\)"):
        load_audio(clip(path))


def test_media_files_go_through_torchcodec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(HEADS[0] + bytes(500))
    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(AudioDecoder=Decoder))
    assert probe(str(path), path.read_bytes()).duration_s == 1.0
    assert len(load_audio(clip(path))) == 15_872
    slice_ = load_audio(Clip(str(path), None, 0.25, 0.75, channel=1))
    np.testing.assert_allclose(slice_[500:7_500], tone(12_000, 0.25)[4_500:11_500], atol=1e-3)
    short = SimpleNamespace(data=torch.zeros(2, 99), pts_seconds=0.0)
    monkeypatch.setattr(Decoder, "get_samples_played_in_range", lambda *_: short)
    with pytest.raises(AudioError, match="is it cut off"):
        load_audio(clip(path))
    path.write_bytes(b"\0\0\3\0ftypM4A " + bytes(500))
    with pytest.raises(AudioError, match="is cut off: its boxes reach to byte 768, and it has 512"):
        load_audio(clip(path))


def test_probe(write_tone: Tone) -> None:
    info = probe(str(write_tone("a.flac", seconds=1.5, rate=8_000, channels=2)))
    assert (info.duration_s, info.sampling_rate, info.channels, info.num_samples) == (1.5, 8_000, 2, 12_000)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg"])
def test_slices_are_cut_from_the_file(write_tone: Tone, name: str) -> None:
    path = write_tone(name, seconds=3.0)
    whole = load_audio(clip(path))
    np.testing.assert_allclose(load_audio(clip(path, 1.0, 2.5)), whole[16_000:40_000], atol=1e-6)
    np.testing.assert_allclose(load_audio(clip(path, 1.0)), whole[16_000:], atol=1e-6)
    assert len(load_audio(clip(path, 1.0, 3.04))) == 32_000  # rounded durations end a little late
    for start, end in ((3.0, None), (1.0, 3.2), (4.0, 5.0)):
        with pytest.raises(AudioError, match=r"is 3\.000 s long: no slice from"):
            load_audio(clip(path, start, end))


def test_bytes_and_tar_members(write_tone: Tone, tmp_path: Path) -> None:
    path = write_tone("a.flac")
    whole = load_audio(clip(path))
    np.testing.assert_array_equal(load_audio(clip("somewhere"), data=path.read_bytes()), whole)
    tar = tmp_path / "shard.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(path, "x/a.flac")
    np.testing.assert_array_equal(load_audio(clip(f"{tar}::x/a.flac")), whole)
    assert probe(f"{tar}::x/a.flac").duration_s == 1.0
    with pytest.raises(AudioError, match="no such member"):
        load_audio(clip(f"{tar}::x/b.flac"))
    with pytest.raises(AudioError, match="larger than the limit of 10 bytes"):
        load_audio(clip(f"{tar}::x/a.flac"), limits=AudioLimits(max_bytes=10))
    tar.write_bytes(tar.read_bytes()[:2_000])
    with pytest.raises(AudioError, match=r"cut off|damaged"):
        load_audio(clip(f"{tar}::x/a.flac"))
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as archive:
        archive.add(path, "a.flac")
    with pytest.raises(AudioError, match="damaged or compressed"):
        load_audio(clip(f"{tmp_path}/gz.tar::a.flac"))
    with pytest.raises(AudioError, match="No such file"):
        load_audio(clip(f"{tmp_path}/none.tar::a.flac"))


def test_urls(write_tone: Tone, tmp_path: Path) -> None:
    """Of a local file no copy is made."""
    path = write_tone("a b.flac")
    remote, other = Remote(str(tmp_path / "cache")), Remote(str(tmp_path / "other"))
    for url in (f"file://{path}", f"file://{path}".replace(" ", "%20")):
        np.testing.assert_array_equal(load_audio(clip(url), remote=remote), load_audio(clip(path)))
    with pytest.raises(AudioError, match=r"file:///none/a\.flac: no such file"):
        load_audio(clip("file:///none/a.flac"), remote=remote)
    assert not (tmp_path / "cache").exists()
    with fsspec.open("memory://a.flac", "wb") as file:
        file.write(path.read_bytes())
    for seconds in (None, 1.0):
        with pytest.raises(AudioError, match=r"^memory://a\.flac: is larger than the limit of 10 bytes"):
            load_audio(Clip("memory://a.flac", seconds), limits=AudioLimits(max_bytes=10), remote=other)
        assert len(load_audio(Clip("memory://a.flac", seconds), remote=remote)) == 16_000
        with pytest.raises(AudioError, match="cannot be fetched"):
            load_audio(Clip("gopher://x/a.flac", seconds), remote=remote)


def test_bounds_come_before_decoding(tmp_path: Path) -> None:
    """A header may promise anything: what is too much is refused at once, and a slice of it is fine."""
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:
        for _ in range(61):
            file.write(np.zeros(16_000 * 60, dtype=np.int16))
    with pytest.raises(AudioError, match=r"3660\.0 s is beyond the limit of 1800 s"):
        load_audio(clip(path))
    assert len(load_audio(clip(path, 3_600.0, 3_601.0))) == 16_000


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (AudioLimits(max_channels=1), "2 channels are beyond the limit of 1"),
        (AudioLimits(max_sampling_rate=8_000), "16000 Hz is outside of"),
        (AudioLimits(max_duration_s=0.5), r"1\.0 s is beyond the limit of 0\.5 s"),
        (AudioLimits(max_samples=9_999), "1.0 s of 2 channels at 16000 Hz are beyond the limit of 9999 samples"),
    ],
)
def test_limits(write_tone: Tone, limits: AudioLimits, says: str) -> None:
    path = write_tone("a.wav", channels=2)
    with pytest.raises(AudioError, match=says) as caught:
        load_audio(clip(path), limits=limits)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite(tmp_path: Path, bad: float) -> None:
    samples = np.zeros(16_000, dtype=np.float32)
    samples[5] = bad
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="not finite"):
        load_audio(clip(tmp_path / "a.wav"))


@pytest.mark.parametrize(
    ("num_samples", "says"),
    [(0, "holds no samples"), (320, r"0\.020 s is too short for an audio token"), (639, r"0\.040 s is too short")],
)
def test_too_short(tmp_path: Path, num_samples: int, says: str) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(num_samples), 16_000)
    for read in (load_audio, clip_duration):
        with pytest.raises(AudioError, match=says):
            read(clip(tmp_path / "a.wav"))


NO_AUDIO = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n": "git-lfs pointer.*git lfs pull",
    b"\n<!DOCTYPE html><html>404</html>": "is a web page",
    b'{"error": "not found"}': "is JSON",
    b"PK\x03\x04\x14\0": "is a zip archive",
    bytes(range(100, 200)): "no audio that libsndfile reads",
    b"Not found, sorry. " * 20: r"no audio that libsndfile reads .*ormat not recognised",
}


def test_files_that_are_no_audio(tmp_path: Path) -> None:
    for content, says in NO_AUDIO.items():
        (tmp_path / "a.wav").write_bytes(content)
        for read in (load_audio, clip_duration):
            with pytest.raises(AudioError, match=says):
                read(clip(tmp_path / "a.wav"))
    with pytest.raises(AudioError, match="no such file"):
        load_audio(clip(tmp_path / "none.wav"))
    with pytest.raises(AudioError, match="no such file"):
        load_audio(clip(tmp_path))


@pytest.mark.parametrize(
    ("format", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)]
)
def test_damaged_files_never_pass_as_whole_or_crash(format: str, subtype: str | None) -> None:
    """Cut off or overwritten anywhere: an AudioError, or finite samples; a FLAC is never shorter than it was."""
    buffer = io.BytesIO()
    soundfile.write(
        buffer, 0.3 * np.random.default_rng(0).normal(size=16_000).clip(-1, 1), 16_000, subtype, format=format
    )
    whole = buffer.getvalue()
    rng = np.random.default_rng(1)
    outcomes: list[int | str] = []
    for share in np.linspace(0.02, 0.98, 13):
        cut = int(len(whole) * share)
        noise = rng.integers(0, 256, 64, dtype=np.uint8).tobytes()
        for data in (whole[:cut], whole[:cut] + noise + whole[cut + 64 :]):
            outcomes.append(outcome(data))
    assert any(isinstance(item, str) for item in outcomes)
    if format == "FLAC":
        assert all(item == 16_000 for item in outcomes if isinstance(item, int))


def outcome(data: bytes) -> int | str:
    """Number of samples, all of them finite, or what the error says."""
    try:
        waveform = load_audio(clip("damaged"), data=data)
    except AudioError as error:
        return str(error)
    assert np.isfinite(waveform).all()
    return len(waveform)


@pytest.mark.parametrize(("subtype", "channels", "rate"), [("PCM_16", 1, 16_000), ("PCM_24", 2, 16_000)])
def test_whole_flac_files_hold_what_libsndfile_reads_in_them(
    tmp_path: Path, subtype: str, channels: int, rate: int
) -> None:
    path = tmp_path / "a.flac"
    noise = np.random.default_rng(0).uniform(-1, 1, (20_001, channels))
    soundfile.write(path, noise, rate, subtype=subtype)
    expected = soundfile.read(path, dtype="float32", always_2d=True)[0]
    for channel in range(channels):
        for data in (None, path.read_bytes()):
            assert np.array_equal(load_audio(Clip(str(path), None, channel=channel), data), expected[:, channel])
            assert _whole_flac(Clip(str(path), None), data or Place(str(path)), AudioLimits()) is not None
    # A slice is libsndfile's: it can begin in the middle.
    assert _whole_flac(Clip(str(path), None, 0.0, 1.0), Place(str(path)), AudioLimits()) is None
    sliced = load_audio(Clip(str(path), None, 0.0, 1.0, channel=0))
    assert np.array_equal(sliced, expected[:16_000, 0])


def test_damaged_flac_files_are_refused_or_hold_the_very_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    rng = np.random.default_rng(0)
    soundfile.write(path, rng.normal(0, 0.1, 8_000).clip(-1, 1), 16_000)
    good, expected = path.read_bytes(), load_audio(clip(path))
    outcomes = []
    for _ in range(300):
        data = bytearray(good)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        try:
            outcomes.append(np.array_equal(load_audio(clip("a.flac"), bytes(data)), expected))
        except AudioError:
            outcomes.append(None)
    assert outcomes.count(None) > 100
    assert False not in outcomes
