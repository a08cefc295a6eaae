"""The loader as the trainer sees it: whole steps, every example once over all ranks, bad files that cost themselves."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import DataConfig, SourceConfig
from qwen2audio_train.data.loading import base
from qwen2audio_train.data.loading.build import build_batches, eval_batches
from qwen2audio_train.data.quarantine import TooManyBadExamples
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO
from qwen2audio_train.layout import MIN_FRAMES
from tests.data.corpora import equal, is_filler, small_config, step_content, take_steps, two_sources, write_corpus

Tok = PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, SourceConfig]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, two_sources(folder)


@pytest.fixture
def config(corpus: tuple[Path, dict[str, SourceConfig]]) -> DataConfig:
    return small_config(*corpus)


def test_an_epoch_is_every_example_once_and_whole_steps(config: DataConfig, tokenizer: Tok) -> None:
    loader = build_batches(config, tokenizer, epochs=1)
    batches = list(loader)
    assert len(batches) == loader.num_steps(1) * 3 == loader.steps_done * 3
    segments = sum(len(batch["cu_q"]) - 1 for batch in batches if not is_filler(batch))
    assert segments == 85
    starts = [ids for batch in batches for ids in batch["input_ids"][0, batch["cu_q"][:-1].long()].tolist()]
    bos = tokenizer.convert_tokens_to_ids("<|audio_bos|>")
    assert Counter(starts)[bos] == 85
    per_source = Counter(s for batch in batches for s in batch["source_id"].tolist())
    assert set(per_source) == {0, 1}
    assert loader.source_names == ("a", "b")


def test_batches_hold_the_keys_of_the_contract(config: DataConfig, tokenizer: Tok) -> None:
    for batch in build_batches(config, tokenizer, epochs=1):
        assert set(batch) == {
            "input_ids",
            "position_ids",
            "predict_from",
            "target",
            "weight",
            "source_id",
            "cu_q",
            "cu_k",
            "mel",
            "clip_frames",
            "audio_slot",
            "transcript",
            "transcript_length",
            "max_q",
            "max_k",
            *QWEN2_AUDIO.clip_index([MIN_FRAMES]),
        }
        numbers = {key for key, value in batch.items() if not isinstance(value, torch.Tensor)}
        assert numbers == {"max_q", "max_k", "clip_longest"}


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_are_disjoint_and_together_the_same_steps(config: DataConfig, tokenizer: Tok, world: int) -> None:
    alone = build_batches(config, tokenizer)
    ranks = [build_batches(config, tokenizer, rank=r, world_size=world) for r in range(world)]
    assert {loader.batches_per_step for loader in ranks} == {-(-3 // world)}
    for one, many in zip(take_steps([alone], 12), take_steps(ranks, 12), strict=True):
        assert step_content(one) == step_content(many)
        assert len(step_content(many)) == 3


def test_micro_batch_split_does_not_change_a_step(config: DataConfig, tokenizer: Tok) -> None:
    config = dataclasses.replace(config, packs_per_step=4)
    sizes, targets = [], []
    for merged in (1, 2, 4):
        loader = build_batches(dataclasses.replace(config, packs_per_forward=merged), tokenizer)
        sizes.append(loader.batches_per_step)
        (step,) = take_steps([loader], 5)[-1]
        targets.append(sorted(t for batch in step for t in batch["target"].tolist()))
    assert sizes == [4, 2, 1]
    assert targets[0] == targets[1] == targets[2]


def test_workers_change_nothing(config: DataConfig, tokenizer: Tok) -> None:
    plain, two = (take_steps([build_batches(dataclasses.replace(config, num_workers=n), tokenizer)], 6) for n in (0, 2))
    for (a,), (b,) in zip(plain, two, strict=True):
        assert all(equal(x, y) for x, y in zip(a, b, strict=True))


def test_weights_are_respected(config: DataConfig, tokenizer: Tok) -> None:
    weights = {"a": 0.25, "b": 0.75}
    sources = {name: dataclasses.replace(s, weight=weights[name]) for name, s in config.sources.items()}
    loader = build_batches(dataclasses.replace(config, sources=sources), tokenizer, epochs=4)
    for _ in loader:
        pass
    log = loader.telemetry.take()
    assert log["a/examples"] + log["b/examples"] == 4 * 85
    assert log["b/share"] == pytest.approx(0.75, abs=0.005)
    assert log["b/weight"] == 0.75
    assert log["b/pass"] == 10  # 255 draws from 25 examples: in its eleventh pass
    assert 0 < log["decode_s"] < log["materialise_s"]
    assert log["a/hours"] == pytest.approx(log["a/examples"] * 0.35 / 3600, rel=0.1)


def test_a_bad_file_costs_itself_alone(tmp_path: Path, tokenizer: Tok) -> None:
    config = small_config(tmp_path, two_sources(tmp_path, 30, 10), max_bad_share=1.0)
    whole = take_steps([build_batches(config, tokenizer)], 8)
    (tmp_path / "a" / "3.wav").write_bytes(b"not audio")
    (tmp_path / "b" / "7.wav").unlink()
    listed = tmp_path / "bad.jsonl"
    loader = build_batches(config, tokenizer, bad_examples_path=listed)
    broken = take_steps([loader], 8)
    changed = 0
    for (a,), (b,) in zip(whole, broken, strict=True):
        for x, y in zip(a, b, strict=True):
            if not equal(x, y):
                changed += 1
                assert len(y["cu_q"]) == len(x["cu_q"]) - 1
                assert torch.isin(y["target"], x["target"]).all()
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert changed == len(entries) > 1
    assert {(entry["example"], entry["kind"]) for entry in entries} == {("a/3", "AudioError"), ("b/7", "AudioError")}
    assert "no such file" in next(entry["reason"] for entry in entries if entry["example"] == "b/7")
    assert loader.telemetry.take()["b/quarantined"] == sum(entry["source"] == "b" for entry in entries)


def test_too_many_bad_files_stop_the_run(tmp_path: Path, tokenizer: Tok) -> None:
    config = small_config(tmp_path, two_sources(tmp_path, 30, 10), max_bad_examples=2)
    for i in range(5):
        (tmp_path / "a" / f"{i}.wav").write_bytes(b"")
    with pytest.raises(TooManyBadExamples, match=r"3 of \d+ examples .*data.max_bad_examples=2.*\n.*wav") as info:
        list(build_batches(config, tokenizer, epochs=1, bad_examples_path=tmp_path / "bad.jsonl"))
    assert "bad.jsonl" in str(info.value)


def test_bad_lines_are_listed_and_left_out(tmp_path: Path, tokenizer: Tok) -> None:
    manifest = write_corpus(tmp_path, "a", [0.2] * 20)
    lines = manifest.read_text().splitlines()
    lines[4] = "{"
    lines[9] = lines[9].replace('"asr"', '"asrr"')
    manifest.write_text("\n".join(lines)[:-30])  # and half a last line
    config = small_config(tmp_path, {"a": SourceConfig(path=[str(manifest)])}, max_bad_share=1.0)
    listed = tmp_path / "bad.jsonl"
    list(build_batches(config, tokenizer, epochs=1, bad_examples_path=listed))
    entries = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [5, 10, 20]
    assert {entry["source"] for entry in entries} == {"a"}
    with pytest.raises(TooManyBadExamples, match="3 of 20"):
        build_batches(dataclasses.replace(config, max_bad_examples=1), tokenizer)


def test_eval_is_every_example_once_evenly(config: DataConfig, tokenizer: Tok) -> None:
    config = dataclasses.replace(config, eval_sources=config.sources, seed=99)
    ranks = [list(eval_batches(config, tokenizer, rank=r, world_size=4)) for r in range(4)]
    assert len({len(batches) for batches in ranks}) == 1
    segments = sum(len(b["cu_q"]) - 1 for batches in ranks for b in batches if not is_filler(b))
    assert segments == 85


def test_impossible_sources_are_refused(tmp_path: Path, config: DataConfig, tokenizer: Tok) -> None:
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        build_batches(dataclasses.replace(config, sources={}), tokenizer)
    with pytest.raises(FileNotFoundError, match=r"data\.sources\.x\.path: no file"):
        build_batches(dataclasses.replace(config, sources={"x": SourceConfig(path=["none.jsonl"])}), tokenizer)
    with pytest.raises(ValueError, match="every example of a is longer than a pack"):
        build_batches(dataclasses.replace(config, tokens_per_pack=9), tokenizer)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"data\.sources\.x: no usable example"):
        build_batches(
            dataclasses.replace(config, sources={"x": SourceConfig(path=[str(tmp_path / "empty.jsonl")])}), tokenizer
        )


def test_what_is_made_ahead_reaches_over_a_whole_step(
    config: DataConfig, tokenizer: Tok, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is counted before its first forward: what is not ready by then is made while the model waits."""
    asked: list[int] = []

    def loader(dataset: Any, *, num_workers: int, prefetch_factor: int, **_: Any) -> list[Any]:
        asked.append(num_workers * prefetch_factor)
        return []

    monkeypatch.setattr(base, "DataLoader", loader)
    for workers, prefetch in ((1, 1), (2, 2), (4, 1), (4, 8)):
        steps = dataclasses.replace(config, packs_per_step=11, num_workers=workers, prefetch_factor=prefetch)
        assert list(build_batches(steps, tokenizer)) == []
    assert asked == [11, 12, 12, 32]
