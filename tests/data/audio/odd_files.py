"""Recordings as people have them: written into pipes, cut off, tagged, joined midway, or no recordings at all.

    python -m tests.data.audio.odd_files FOLDER      makes them there and prints how each is read

FFmpeg and SoX write them, where they are installed. Each is read with FFmpeg's length to a frame of its codec, or is
refused with a reason that its owner can act on: `REFUSED` says which, and is what `test_odd_files.py` holds.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from qwen2audio_train.data.audio.decode import clip_duration, load_audio
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.examples import Clip

SECONDS = 7.3
CUT = ("wav", "flac", "ogg", "opus", "mp3", "aiff", "w64", "au", "caf", "webm", "m4a")
REFUSED = {
    **dict.fromkeys((f"half.{form}" for form in CUT), "is cut off"),
    "no_end.ogg": "end-of-stream mark",
    "two.ogg": "several Ogg streams",
    "lfs.wav": "git lfs pull",
    "page.mp3": "web page",
    "error.json.wav": "is JSON",
    "empty.flac": "is empty",
    "archive.wav": "zip archive",
    "ten_ms.wav": "too short",
    "wma.wma": "is WMA",
    "wavpack.wv": "is WavPack",
    "stream.ts": "transport stream",
    "aac.wav": "convert|ffmpeg -i",
    "two_rates.mp3": "another sampling rate",
    "sox.caf": "has its header twice",
    "sox.w64": "has its header twice",
}
"""Names of files, and what their refusals say."""


def write_sources(folder: Path) -> None:
    """mono.wav at 16 kHz and stereo.wav at 44.1 kHz: a tone that comes and goes, so that variable bit rates vary."""
    for name, rate, channels in (("mono", 16_000, 1), ("stereo", 44_100, 2)):
        times = np.arange(round(SECONDS * rate)) / rate
        loud = (np.sin(2 * np.pi * 0.7 * times) > -0.3) * (0.5 + 0.5 * np.sin(2 * np.pi * 3 * times))
        noise = np.random.default_rng(0).normal(size=len(times))
        wave = loud * (0.2 * np.sin(2 * np.pi * (200 + 80 * np.sin(times)) * times) + 0.05 * noise)
        soundfile.write(folder / f"{name}.wav", np.stack([wave * (1 - 0.3 * c) for c in range(channels)], 1), rate)


def ffmpeg(folder: Path, target: str, *options: str, source: str = "mono.wav", piped: bool = False) -> None:
    command = ["ffmpeg", "-y", "-loglevel", "error", "-i", str(folder / source), *options]
    if piped:
        with (folder / target).open("wb") as out:
            subprocess.run([*command, "-"], stdout=out, stderr=subprocess.DEVNULL, check=True)
    else:
        subprocess.run([*command, str(folder / target)], check=True)


def write_files(folder: Path) -> None:
    """Every file that the installed programs can write."""
    write_sources(folder)
    write_no_audio(folder)
    if shutil.which("sox"):
        for form in ("wav", "flac", "aiff", "au", "ogg", "caf", "w64", "sph"):
            with (folder / f"sox.{form}").open("wb") as out:
                piped = subprocess.Popen(["sox", folder / "mono.wav", "-t", form, "-"], stdout=subprocess.PIPE)
                assert piped.stdout is not None
                out.write(piped.stdout.read())
                piped.wait()
    if shutil.which("ffmpeg"):
        write_mp3(folder)
        write_containers(folder)
        write_damage(folder)


def write_mp3(folder: Path) -> None:
    for source in ("mono", "stereo"):
        wave = f"{source}.wav"
        ffmpeg(folder, f"{source}_xing.mp3", "-b:a", "64k", source=wave)
        ffmpeg(folder, f"{source}_vbr_xing.mp3", "-q:a", "5", source=wave)
        ffmpeg(folder, f"{source}_vbr.mp3", "-write_xing", "0", "-id3v2_version", "0", "-q:a", "5", source=wave)
        ffmpeg(folder, f"{source}_abr.mp3", "-write_xing", "0", "-abr", "1", "-b:a", "48k", source=wave)
        ffmpeg(folder, f"{source}_tag.mp3", "-write_xing", "0", "-b:a", "32k", source=wave)
        ffmpeg(folder, f"{source}_pipe.mp3", "-f", "mp3", source=wave, piped=True)
        ffmpeg(folder, f"{source}_mp3.wav", "-c:a", "libmp3lame", "-b:a", "64k", source=wave)
        ffmpeg(folder, f"{source}.mp2", "-c:a", "mp2", "-b:a", "64k", source=wave)
    tagged = (folder / "mono_tag.mp3").read_bytes()
    size = 300_000
    art = b"ID3\3\0\0" + bytes(size >> shift & 127 for shift in (21, 14, 7, 0)) + np.random.default_rng(1).bytes(size)
    (folder / "art.mp3").write_bytes(art + tagged)
    (folder / "id3v1.mp3").write_bytes(tagged + b"TAG" + bytes(125))
    (folder / "ape.mp3").write_bytes(tagged + b"APETAGEX" + struct.pack("<IIII8x", 2000, 32, 0, 0))
    (folder / "two_rates.mp3").write_bytes(tagged + (folder / "stereo_tag.mp3").read_bytes())
    (folder / "joined_midway.mp3").write_bytes(tagged[len(tagged) // 3 :])
    (folder / "half_bare.mp3").write_bytes(tagged[: len(tagged) * 6 // 10 + 7])


def write_containers(folder: Path) -> None:
    for form in ("flac", "wav", "au", "caf", "ogg", "opus", "webm"):
        ffmpeg(folder, f"pipe.{form}", "-f", form, *(("-c:a", "libopus") if form == "webm" else ()), piped=True)
    ffmpeg(folder, "live.webm", "-f", "webm", "-live", "1", "-c:a", "libopus", piped=True)
    for name, options in {
        "rf64.wav": ["-rf64", "always"],
        "adpcm_ms.wav": ["-c:a", "adpcm_ms"],
        "adpcm_ima.wav": ["-c:a", "adpcm_ima_wav"],
        "mulaw.wav": ["-c:a", "pcm_mulaw", "-ar", "8000"],
        "deep.wav": ["-c:a", "pcm_s24le"],
        "float.wav": ["-c:a", "pcm_f32le"],
        "raw.aac": ["-c:a", "aac"],
        "flac.mka": ["-c:a", "flac"],
        "vorbis.webm": ["-c:a", "libvorbis"],
        "alac.m4a": ["-c:a", "alac"],
        "parts.m4a": ["-c:a", "aac", "-movflags", "frag_keyframe+empty_moov"],
        "tagged.aac": ["-c:a", "aac", "-write_id3v2", "1"],
        "flac.ogg": ["-c:a", "flac"],
        "six.ogg": ["-c:a", "libvorbis", "-ac", "6"],
        "double.wav": ["-c:a", "pcm_f64le"],
        "byte.wav": ["-c:a", "pcm_u8"],
        "deep.flac": ["-sample_fmt", "s32"],
        "wma.wma": ["-c:a", "wmav2"],
        "wavpack.wv": ["-c:a", "wavpack"],
        "stream.ts": ["-c:a", "aac"],
        "aac.wav": ["-c:a", "aac"],
        **{f"plain.{form}": [] for form in ("flac", "ogg", "opus", "mp3", "aiff", "w64", "au", "caf", "webm", "m4a")},
    }.items():
        ffmpeg(folder, name, *options)
    shutil.copy(folder / "mono.wav", folder / "plain.wav")
    ffmpeg(folder, "fast.m4a", "-movflags", "+faststart")


def write_damage(folder: Path) -> None:
    for form in CUT:
        whole = (folder / ("fast.m4a" if form == "m4a" else f"plain.{form}")).read_bytes()
        (folder / f"half.{form}").write_bytes(whole[: len(whole) // 2])
    wav = (folder / "plain.wav").read_bytes()
    place = wav.index(b"data") + 4
    for size in (0, 0xFFFFFFFF, 0x7FFFF000):
        (folder / f"size_{size:x}.wav").write_bytes(wav[:place] + struct.pack("<I", size) + wav[place + 4 :])
    (folder / "junk_after.wav").write_bytes(wav + b"junk" * 100)
    ogg = (folder / "plain.ogg").read_bytes()
    (folder / "no_end.ogg").write_bytes(ogg[: ogg.rindex(b"OggS")])
    (folder / "two.ogg").write_bytes(ogg + (folder / "pipe.ogg").read_bytes())
    flac = (folder / "plain.flac").read_bytes()
    (folder / "no_total.flac").write_bytes(flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:])


def write_no_audio(folder: Path) -> None:
    (folder / "lfs.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (folder / "page.mp3").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "error.json.wav").write_text('{"error": "not found"}')
    (folder / "archive.wav").write_bytes(b"PK\3\4" + bytes(50))
    (folder / "empty.flac").write_bytes(b"")
    soundfile.write(folder / "ten_ms.wav", np.zeros(160), 16_000)


def ffmpeg_length(path: Path) -> float | None:
    """Seconds that FFmpeg decodes, at the file's own rate; None where it reads nothing."""
    asked = ["ffprobe", "-v", "error", "-select_streams", "a:0", "-show_entries", "stream=sample_rate,channels"]
    about = subprocess.run([*asked, "-of", "json", str(path)], capture_output=True, text=True).stdout
    streams = json.loads(about or "{}").get("streams")
    if not streams or streams[0]["sample_rate"] == "0":
        return None
    decoded = subprocess.run(
        ["ffmpeg", "-loglevel", "quiet", "-i", str(path), "-f", "f32le", "-ac", "1", "-"], capture_output=True
    ).stdout
    return len(decoded) / 4 / int(streams[0]["sample_rate"])


def read(path: Path) -> tuple[float, float] | str:
    """Seconds that are announced and that are decoded, or the reason of the refusal."""
    clip = Clip(str(path), None)
    try:
        return clip_duration(clip), len(load_audio(clip)) / 16_000
    except AudioError as error:
        return error.reason


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_files(folder)
    print("| file | FFmpeg, s | announced, s | decoded, s |\n|---|---|---|---|")
    for path in sorted(folder.iterdir()):
        known, found = ffmpeg_length(path), read(path)
        told = f"refused: {found} |" if isinstance(found, str) else f"{found[0]:.4f} | {found[1]:.4f}"
        print(f"| {path.name} | {'-' if known is None else f'{known:.4f}'} | {told} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
