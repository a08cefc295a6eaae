"""Slices of long recordings: milliseconds for each, by format, as files of their own and inside of a tar.

    python benchmarks/slices.py            # an hour of sound; --minutes 5 for a quick look

6 s at random places of one recording, as training asks for them; the median over all but the first, which learns where
a file's frames stand (its cost is the column `first`). FFmpeg writes what libsndfile does not. Prints a JSON line.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from record import save

from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.examples import Clip

FORMS = {"wav": None, "flac": None, "ogg": "VORBIS", "mp3": None}
SLICES, LENGTH_S, RATE = 40, 6.0, 16_000


def write_all(folder: Path, minutes: float) -> list[Path]:
    """The recording in every form that can be written here."""
    rng = np.random.default_rng(0)
    paths = []
    for form, subtype in FORMS.items():
        paths.append(folder / f"a.{form}")
        with soundfile.SoundFile(paths[-1], "w", RATE, 1, subtype) as file:
            for _ in range(round(minutes)):
                file.write(0.1 * rng.standard_normal(60 * RATE).clip(-1, 1))
    if shutil.which("ffmpeg"):
        for name, options in {"vbr.mp3": ["-write_xing", "0", "-q:a", "5"], "a.webm": ["-c:a", "libopus"]}.items():
            paths.append(folder / name)
            command = ["ffmpeg", "-loglevel", "error", "-i", str(paths[0]), *options, str(paths[-1])]
            subprocess.run(command, check=True)
    return paths


def times_ms(path: str, minutes: float) -> tuple[float, float]:
    """Milliseconds of the first slice, and of the median one of the others."""
    places = np.random.default_rng(1).uniform(0, 60 * minutes - LENGTH_S, SLICES)
    taken = []
    for start in places.tolist():
        began = time.perf_counter()
        load_audio(Clip(path, None, start, start + LENGTH_S))
        taken.append(1000 * (time.perf_counter() - began))
    return round(taken[0], 1), round(statistics.median(taken[1:]), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_all(folder, minutes)
        with tarfile.open(folder / "all.tar", "w") as archive:
            for path in paths:
                archive.add(path, path.name)
        for path in paths:
            for where in (str(path), f"{folder}/all.tar::{path.name}"):
                first, median = times_ms(where, minutes)
                found[path.name + (" in a tar" if "::" in where else "")] = {"first_ms": first, "slice_ms": median}
    save("slices", {"minutes": minutes, "slices": found})


if __name__ == "__main__":
    main()
