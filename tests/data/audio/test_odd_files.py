"""The odd files of `odd_files.py`: FFmpeg's length to a frame of the codec, or a reason that their owner can act on."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.examples import Clip
from tests.data.audio.odd_files import REFUSED, ffmpeg_length, read, write_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs FFmpeg to write them"),
]

FRAME_S = 1024 / 16_000
"""The longest frame of a codec among them, AAC's."""
MILLISECOND = 16
"""Samples; the times in Matroska are whole milliseconds."""
MEDIA = (".webm", ".mka", ".m4a", ".aac")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    write_files(folder)
    return folder


def has_torchcodec() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def test_each_is_read_as_ffmpeg_does_or_refused_with_a_reason(folder: Path) -> None:
    paths = [path for path in sorted(folder.iterdir()) if path.suffix not in MEDIA or has_torchcodec()]
    assert len(paths) > 60
    wrong = []
    for path in paths:
        found = read(path)
        if isinstance(found, str):
            if not re.search(REFUSED.get(path.name, "(never)"), found):
                wrong.append((path.name, found))
            continue
        known = ffmpeg_length(path)
        if path.name in REFUSED or known is None or max(abs(seconds - known) for seconds in found) > FRAME_S + 1e-6:
            wrong.append((path.name, f"{found}, FFmpeg {known}"))
    assert wrong == []


@pytest.mark.skipif(not has_torchcodec(), reason="needs the extra media")
@pytest.mark.parametrize("name", ["live.webm", "plain.webm", "vorbis.webm", "flac.mka", "alac.m4a", "raw.aac"])
def test_slices_are_those_of_the_whole(folder: Path, name: str) -> None:
    path = str(folder / name)
    whole = load_audio(Clip(path, None))
    for start, end in ((0.0, 1.0), (0.5, 2.25), (3.0, 6.5), (6.9, None)):
        first, last = round(start * 16_000), len(whole) if end is None else round(end * 16_000)
        part = load_audio(Clip(path, None, start, end))
        assert abs(len(part) - (last - first)) <= MILLISECOND
        length = min(len(part), last - first) - 1600  # resampling sees no further than a slice's edges
        wanted = whole[first + 800 :][:length]
        shifts = range(800 - MILLISECOND, 800 + MILLISECOND + 1)
        assert min(np.abs(part[shift:][: len(wanted)] - wanted[: len(part) - shift]).max() for shift in shifts) < 2e-3
