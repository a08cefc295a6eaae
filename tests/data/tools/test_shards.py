"""Shards: everything once, the same bytes every time, by any number of processes, also after an interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.examples import clips_of
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.manifests.cache import find_manifests, good_examples
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.data.tools import shards
from qwen2audio_train.data.tools.shards import ShardOptions, write_shards
from qwen2audio_train.data.tools.stats import (
    IndexOptions,
    draw_histogram,
    histogram_table,
    index_sources,
    stats_of,
    stats_table,
)
from tests.data.corpora import fingerprint, small_config, write_corpus


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def options(tmp_path: Path) -> ShardOptions:
    manifest = write_corpus(tmp_path, "a", np.linspace(0.1, 1.0, 40).round(3).tolist())
    chat = {
        "id": "chat",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "audio", "audio": {"path": "a/39.wav", "start_s": 0.25, "end_s": 0.5}}],
            },
            {"role": "user", "content": [{"type": "audio", "audio": "a/0.wav"}, {"type": "text", "text": "And this?"}]},
            {"role": "assistant", "content": "A tone."},
        ],
        "meta": {"x": 1},
    }
    with manifest.open("a") as file:
        file.write(json.dumps(chat) + "\n")
    out = str(tmp_path / "out")
    return ShardOptions([str(manifest)], out, shard_mib=0.125, num_workers=1, cache_dir=str(tmp_path / "cache"))


def test_the_same_bytes_every_time(options: ShardOptions, tmp_path: Path) -> None:
    result = write_shards(options)
    assert (result.num_examples, result.bad) == (41, [])
    assert 5 <= result.num_shards <= 8
    again = dataclasses.replace(options, output=str(tmp_path / "again"), num_workers=2)
    write_shards(again)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "again")
    write_shards(dataclasses.replace(options, output=str(tmp_path / "other"), seed=1))
    assert hashes(tmp_path / "out")["shard-000000.tar"] != hashes(tmp_path / "other")["shard-000000.tar"]
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))[:-1]]
    assert all(0.7 * 2**17 < size < 1.3 * 2**17 for size in sizes)


@pytest.mark.parametrize("form", ["tars", "manifests"])
def test_shards_hold_the_examples_that_went_in(options: ShardOptions, tmp_path: Path, form: str) -> None:
    write_shards(options)
    (tmp_path / "moved").mkdir()
    (tmp_path / "out").rename(tmp_path / "moved" / "out")
    pattern = "shard-*.tar" if form == "tars" else "shard-*[0-9].jsonl"
    source = SourceConfig([str(tmp_path / "moved" / "out" / pattern)])
    found = {e.id: e for e in good_examples(find_manifests("s", source, Remote(str(tmp_path / "cache"))))}
    plain = {
        e.id: e for e in good_examples(find_manifests("s", SourceConfig(options.manifests), Remote(str(tmp_path))))
    }
    assert found.keys() == plain.keys()
    assert list(found) != list(plain)
    for id, example in plain.items():
        for ours, theirs in zip(clips_of(found[id]), clips_of(example), strict=True):
            assert ours.path.startswith(str(tmp_path / "moved"))
            np.testing.assert_array_equal(load_audio(ours), load_audio(theirs))
        assert dataclasses.replace(found[id], **_clipless(example)) == example
    assert found["chat"].meta == {"x": 1}


def _clipless(example: Any) -> dict[str, Any]:
    return {"clip": example.clip} if hasattr(example, "clip") else {"messages": example.messages}


def test_training_on_shards_is_training_on_the_files(
    options: ShardOptions, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_shards(options)
    batches = []
    for path in (options.manifests[0], str(tmp_path / "out" / "shard-*.tar")):
        config = small_config(tmp_path, {"s": SourceConfig([path])}, samples_per_pack=1, packs_per_step=1)
        batches.append(sorted(fingerprint(b) for b in build_batches(config, tokenizer, epochs=1)))
    assert len(batches[0]) == 41
    assert batches[0] == batches[1]


def test_an_interrupted_run_goes_on(options: ShardOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(dataclasses.replace(options, output=str(tmp_path / "whole")))
    written = []
    plain = shards._write_shard

    def until_the_third(index: Any, options: ShardOptions, job: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job[0])
        plain(index, options, job)

    monkeypatch.setattr(shards, "_write_shard", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_shards(options)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3
    for left in ("shard-000003.4711.part", ".shard-000003.jsonl.4711.part"):  # as kill -9 leaves them
        (tmp_path / "out" / left).write_text("half")
    monkeypatch.setattr(shards, "_write_shard", lambda i, o, job: (written.append(job[0]), plain(i, o, job)))
    write_shards(options)
    assert written == sorted(set(written))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    with pytest.raises(ConfigError, match="holds shards of other manifests or settings"):
        write_shards(dataclasses.replace(options, seed=5))


def test_what_cannot_be_read_is_told_and_left_out(options: ShardOptions, tmp_path: Path) -> None:
    (tmp_path / "a" / "7.wav").write_bytes(b"no audio")
    with Path(options.manifests[0]).open("a") as file:
        file.write("{broken\n")
    result = write_shards(options)
    assert result.num_examples == 40
    assert sorted(item.kind for item in result.bad) == ["AudioError", "ManifestError"]


def test_everything_as_flac(options: ShardOptions, tmp_path: Path) -> None:
    write_shards(dataclasses.replace(options, audio="flac"))
    source = SourceConfig([str(tmp_path / "out" / "shard-*.tar")])
    for example in good_examples(find_manifests("s", source, Remote(str(tmp_path / "cache")))):
        for clip in clips_of(example):
            assert clip.path.endswith(".flac")
            if example.id.startswith("a/"):
                samples, _ = soundfile.read(tmp_path / f"{example.id}.wav", dtype="float32")
                np.testing.assert_array_equal(load_audio(clip), samples)


@pytest.mark.parametrize("audio", ["keep", "flac"])
def test_a_chosen_channel_stays_chosen(tmp_path: Path, audio: str) -> None:
    """The file keeps its channels and the record their choice; FLAC of ours holds that channel alone."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (8_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "two.wav", samples, 16_000)
    lines = [
        {"id": str(channel), "audio": {"path": "two.wav", "channel": channel, **times}, "task": "ser", "target": "x"}
        for channel, times in enumerate([{}, {"start_s": 0.1, "end_s": 0.4}])
    ]
    manifest = tmp_path / "two.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [load_audio(example.clip) for example in read_manifest(manifest)]  # type: ignore[union-attr]
    write_shards(ShardOptions([str(manifest)], str(tmp_path / "out"), audio=audio, cache_dir=str(tmp_path / "cache")))
    for form in ("shard-*.tar", "shard-*.jsonl"):
        source = SourceConfig([str(tmp_path / "out" / form)])
        found = {e.id: e for e in good_examples(find_manifests("s", source, Remote(str(tmp_path / "cache"))))}
        for number, waveform in enumerate(given):
            np.testing.assert_allclose(load_audio(found[str(number)].clip), waveform, atol=1e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize(("channels", "level"), [(1, 3.0), (16, 0.5), (2, 0.9)])
def test_slices_lose_nothing(tmp_path: Path, channels: int, level: float) -> None:
    """Floats beyond 1, which FLAC would clip, and more channels than it has."""
    samples = np.random.default_rng(0).uniform(-level, level, (8_000, channels)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    line = {"id": "0", "audio": {"path": "a.wav", "start_s": 0.1, "end_s": 0.4}, "task": "ser", "target": "x"}
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps(line) + "\n")
    assert write_shards(ShardOptions([str(manifest)], str(tmp_path / "out"), cache_dir=str(tmp_path / "c"))).bad == []
    (example,) = read_manifest(tmp_path / "out" / "shard-000000.jsonl")
    expected = samples[1_600:6_400].mean(axis=1, dtype=np.float32)
    np.testing.assert_allclose(load_audio(example.clip), expected, atol=2e-7)  # type: ignore[union-attr]


def test_stats(options: ShardOptions, tmp_path: Path) -> None:
    found = index_sources(IndexOptions(manifests=options.manifests, num_workers=0, cache_dir=str(tmp_path / "cache")))
    stats = {name: stats_of(index) for name, index in found.items()}
    one = stats["a"]
    assert (one.examples, one.bad_lines, one.text_tokens) == (41, 0, 0)
    assert one.hours == pytest.approx((40 * 0.55 + 0.25 + 0.1) / 3600, rel=1e-4)
    assert one.tasks == {"asr": 40, "chat": 1}
    assert sum(one.histogram) == 41
    assert one.percentiles_s[3] == pytest.approx(1.0)
    head, row = stats_table(stats).splitlines()
    assert row.split()[:3] == ["a", "41", "0.01"]
    assert [line.split() for line in histogram_table(stats).splitlines()[1:]] == [
        ["0", "to", "1", "40"],
        ["1", "to", "2", "1"],
    ]
    twice = [options.manifests[0], str(tmp_path / "b" / "a.jsonl")]
    write_corpus(tmp_path / "b", "a", [0.2])
    assert list(index_sources(IndexOptions(twice, num_workers=0, cache_dir=str(tmp_path / "cache")))) == twice
    draw_histogram(found, str(tmp_path / "h.png"))
    assert (tmp_path / "h.png").stat().st_size > 5000
    assert head.startswith("source")
