"""A thousand broken inputs: none stops the run, and each is a good example or stands in the list with its reason."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import soundfile
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.audio.files import AudioError
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.loading.build_streaming import ShardReader
from qwen2audio_train.data.loading.indexed import PackLoader
from qwen2audio_train.data.loading.logical_stream import Raw
from qwen2audio_train.data.manifests.corpus import open_corpus
from qwen2audio_train.data.quarantine import BadExample
from qwen2audio_train.data.storage.remote import Remote
from tests.data.corpora import asr_line, is_filler, small_config
from tests.data.storage.test_blobs import write_tar

Damage = Callable[[random.Random, bytes], bytes]


def flip_bits(draw: random.Random, data: bytes) -> bytes:
    """Anywhere, one in ten of them in the first bytes."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 3, 30])):
        out[draw.randrange(len(out) if draw.random() < 0.9 else min(64, len(out)))] ^= 1 << draw.randrange(8)
    return bytes(out)


def rewrite_header(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(60)
    return data[:start] + draw.randbytes(draw.choice([1, 4, 8, 16])) + data[start + 16 :]


def cut_off(draw: random.Random, data: bytes) -> bytes:
    return data[: draw.randrange(len(data))]


def cut_out(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    return data[:start] + data[start + draw.choice([1, 100, 512, 1000]) :]


def blank(draw: random.Random, data: bytes) -> bytes:
    start = draw.randrange(len(data))
    length = draw.choice([4, 100, 512, 2000])
    return (data[:start] + bytes([draw.choice([0, 255])]) * length + data[start + length :])[: len(data)]


def replace_all(draw: random.Random, data: bytes) -> bytes:
    return draw.choice([b"", b"\0" * 4096, draw.randbytes(draw.randrange(3000)), b"<!DOCTYPE html><html>no</html>"])


DAMAGES: tuple[Damage, ...] = (flip_bits, rewrite_header, cut_off, cut_out, blank, replace_all)


def broken(number: int, data: bytes) -> bytes:
    return DAMAGES[number % len(DAMAGES)](random.Random(number), data)


def audio_files() -> list[tuple[str, bytes]]:
    """(ending, contents) of half a second of a tone in every form, with one and with two channels."""
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(8_000) / 16_000)
    forms = [("wav", "PCM_16"), ("wav", "FLOAT"), ("flac", "PCM_16"), ("ogg", "VORBIS"), ("ogg", "OPUS"), ("mp3", None)]
    made = []
    for (ending, subtype), channels in ((form, n) for form in forms for n in (1, 2)):
        out = io.BytesIO()
        soundfile.write(out, np.stack([tone] * channels, axis=1), 16_000, format=ending.upper(), subtype=subtype)
        made.append((ending, out.getvalue()))
    return made


def trained_on(
    config_source: SourceConfig, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> tuple[int, Counter[str]]:
    """Examples that an epoch gives, and how often each is in the list of the bad ones."""
    config = small_config(folder, {"s": config_source}, max_bad_share=1.0, tokens_per_pack=4096)
    listed = folder / "bad.jsonl"
    loader = build_batches(config, tokenizer, epochs=1, bad_examples_path=listed)
    good = sum(len(batch["cu_q"]) - 1 for batch in loader if not is_filler(batch))
    entries = [json.loads(line) for line in listed.read_text("utf-8").splitlines()] if listed.exists() else []
    assert all(entry["reason"] for entry in entries)
    return good, Counter(entry["example"] for entry in entries)


def test_600_audio_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = audio_files()
    lines = []
    for i in range(600):
        ending, data = files[i % len(files)]
        (tmp_path / f"{i}.{ending}").write_bytes(broken(i // len(files), data))
        line = asr_line(f"id{i}", f"{i}.{ending}", 0.5, "hello")
        if i % 2:
            del line["duration_s"]  # read from the header, when the index is built
        lines.append(json.dumps(line) + "\n")
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(lines))
    good, bad = trained_on(SourceConfig([str(manifest)]), tmp_path, tokenizer)
    assert good + sum(bad.values()) == 600
    assert set(bad.values()) == {1}
    assert good > 60
    assert len(bad) > 200


def test_what_is_decoded_of_broken_files_is_sound() -> None:
    for i, (ending, data) in enumerate(audio_files() * 12):
        with suppress(AudioError):
            waveform = load_audio(Clip(f"a.{ending}", None), broken(1000 + i, data))
            assert waveform.ndim == 1
            assert waveform.dtype == np.float32
            assert np.isfinite(waveform).all()


def test_200_manifest_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    soundfile.write(tmp_path / "a.wav", np.ones(8_000) * 0.1, 16_000)
    lines = []
    for i in range(200):
        whole = json.dumps(
            {**asr_line(f"id{i}", "a.wav", 0.5, "hello ü"), "meta": {"x": [1, None]}}, ensure_ascii=False
        )
        lines.append(broken(i, whole.encode()).replace(b"\n", b" "))
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(b"\n".join(lines))
    good, bad = trained_on(SourceConfig([str(manifest)]), tmp_path, tokenizer)
    assert good + sum(bad.values()) == sum(bool(line.strip()) for line in lines)
    assert 0 < good < 100


def test_200_tar_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """By an index and as streams: a shard that gives fewer than its four examples says why."""
    files = audio_files()
    for i in range(200):
        members = {}
        for j in range(4):
            ending, data = files[(i + j) % len(files)]
            members |= {f"{j}.{ending}": data, f"{j}.txt": b"hello"}
        whole = write_tar(tmp_path / f"{i:03d}.tar", members).read_bytes()
        (tmp_path / f"{i:03d}.tar").write_bytes(broken(i, whole))
    source = SourceConfig([str(tmp_path / "*.tar")], constants={"task": "asr", "language": "en"})
    good, bad = trained_on(source, tmp_path, tokenizer)
    loader = build_batches(small_config(tmp_path, {"s": source}, max_bad_share=1.0), tokenizer)
    assert isinstance(loader, PackLoader)
    (index,) = loader.planner.indexes
    assert good + sum(bad.values()) == len(index) + len(index.bad())
    reasons = Counter(item.example.rpartition(":")[0] for item in index.bad())
    reader = ShardReader(open_corpus("s", source, Remote(str(tmp_path / "cache"))))
    for shard, (manifest, count) in enumerate(zip(index.files, index.file_counts, strict=True)):
        assert count == 4 or reasons[manifest.place] > 0
        rows = list(reader.read(shard))
        found = sum(isinstance(row, Raw) for row in rows)
        assert found >= count  # an index has read the headers of the clips as well
        assert found == 4 or any(isinstance(row, BadExample) and row.reason for row in rows), manifest.place
