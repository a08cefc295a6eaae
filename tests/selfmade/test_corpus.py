"""The self-made corpus as built: manifests, audio, labels, disjointness, reproducibility."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from qwen2audio_train.data.manifests.manifest import read_manifest, validate_manifest

pytest.importorskip("espeakng_loader")

from qwen2audio_train.errors import MissingLibraryError
from qwen2audio_train.selfmade import build, speech

SOURCES = ("asr_en", "asr_de", "asr_zh", "s2tt_en_de", "s2tt_de_en", "s2tt_en_zh", "s2tt_zh_en")
SOURCES += ("lid", "sgc", "sec", "asc", "mnc", "aqa")
PRETRAIN = tuple(f"pretrain.{source}.train.jsonl" for source in SOURCES)
REST = (
    "pretrain.dev.jsonl",
    "sft.train.jsonl",
    "sft.dev.jsonl",
    "commands.dev.jsonl",
    "dpo.train.jsonl",
    "dpo.dev.jsonl",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selfmade") / "corpus"
    build(folder, "small", num_workers=1)
    return folder


def lines(corpus: Path, *names: str) -> list[dict[str, Any]]:
    return [json.loads(line) for name in names for line in (corpus / name).read_text("utf-8").splitlines()]


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_all_manifests_are_valid_and_counted(corpus: Path) -> None:
    card = json.loads((corpus / "corpus.json").read_text("utf-8"))
    assert set(card["lines"]) == {*PRETRAIN, *REST}
    for name, count in card["lines"].items():
        assert validate_manifest(corpus / name) == []
        assert len(read_manifest(corpus / name)) == count > 0


def test_durations_are_those_of_the_files(corpus: Path) -> None:
    stated: dict[str, float] = {}
    for line in lines(corpus, *PRETRAIN, *REST):
        messages = line.get("messages", line.get("prompt", []))
        parts = [part for m in messages if m["role"] == "user" for part in m["content"]]
        for clip in [line] if "audio" in line else [part for part in parts if part["type"] == "audio"]:
            stated[clip["audio"]] = clip["duration_s"]
    assert set(stated) <= {str(path.relative_to(corpus)) for path in (corpus / "audio").rglob("*.wav")}
    for path, duration_s in stated.items():
        info = soundfile.info(corpus / path)
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert info.frames / 16_000 == duration_s
        assert 0.1 < duration_s < 6


def test_audio_is_neither_silent_nor_clipped(corpus: Path) -> None:
    for path in sorted((corpus / "audio").rglob("*.wav")):
        waveform, _ = soundfile.read(path)
        level_db = 10 * np.log10(np.mean(waveform**2))
        assert -45 < level_db < -15, path
        assert np.abs(waveform).max() < 0.99, path


def test_a_second_call_returns_at_once(corpus: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    card = build(corpus, "small", progress=lambda done, total: pytest.fail("rendered again"))
    assert card["variant"] == "small"
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    build(tmp_path / "two", "small", num_workers=2)
    assert tree(tmp_path / "two") == tree(corpus)


@pytest.mark.slow
def test_another_seed_gives_another_corpus_of_the_same_size(corpus: Path, tmp_path: Path) -> None:
    card = build(tmp_path / "one", "small", seed=1, num_workers=1)
    first = json.loads((corpus / "corpus.json").read_text("utf-8"))
    assert card["lines"]["sft.train.jsonl"] == first["lines"]["sft.train.jsonl"]
    shared = set(tree(tmp_path / "one").values()) & set(tree(corpus).values())
    assert not shared


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "corpus", "small", num_workers=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds no corpus\.json"):
        build(tmp_path, "small")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_unknown_variant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of small, demo, full"):
        build(tmp_path, "huge")


def test_missing_synthesiser_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    speech._loader.cache_clear()
    with pytest.raises(MissingLibraryError, match=r"pip install 'qwen2audio-train\[demo\]'"):
        build(tmp_path / "corpus", "small")
    speech._loader.cache_clear()


def test_held_out_voices_and_sentences_are_not_trained_on(corpus: Path) -> None:
    train, dev = lines(corpus, *PRETRAIN), lines(corpus, "pretrain.dev.jsonl")
    speakers = [{line["meta"]["speaker"] for line in part if "speaker" in line["meta"]} for part in (train, dev)]
    assert not speakers[0] & speakers[1]
    texts = [{line["target"] for line in part if line["task"] == "asr"} for part in (train, dev)]
    assert not texts[0] & texts[1]
    asked = {said for line in lines(corpus, "sft.dev.jsonl") for said in line["meta"]["said"]} - {""}
    assert not asked & texts[0]


def test_unseen_words_are_those_that_training_lacks(corpus: Path) -> None:
    asr = [line for line in lines(corpus, *PRETRAIN) if line["task"] == "asr"]
    known = {word for line in asr if line["language"] == "en" for word in line["target"].split()}
    marked = 0
    for line in lines(corpus, "pretrain.dev.jsonl"):
        if line["task"] == "asr" and line["language"] == "en":
            assert line["meta"]["unseen_words"] == [word for word in line["target"].split() if word not in known]
            marked += bool(line["meta"]["unseen_words"])
    assert marked >= 3


def test_no_answer_is_common(corpus: Path) -> None:
    for name in ("sft.train.jsonl", "sft.dev.jsonl"):
        for mode in ("voice_chat", "analysis"):
            answers = Counter(x["messages"][-1]["content"] for x in lines(corpus, name) if x["mode"] == mode)
            assert answers.most_common(1)[0][1] / answers.total() < 0.2
    for source, share in (("sgc", 0.5), ("lid", 1 / 3), ("sec", 1 / 12), ("asc", 1 / 6)):
        labels = Counter(x["target"] for x in lines(corpus, *PRETRAIN) if x["source"] == source)
        assert labels.most_common(1)[0][1] / labels.total() == pytest.approx(share)


def test_sft_covers_modes_turns_and_clips(corpus: Path) -> None:
    rows = lines(corpus, "sft.train.jsonl")
    assert {"voice_chat", "analysis"} == {row["mode"] for row in rows}
    assert any(row["meta"]["turns"] > 1 for row in rows)
    assert any(row["meta"]["clips"] == 2 and row["meta"]["turns"] == 1 for row in rows)
    voice_chat = [row for row in rows if row["mode"] == "voice_chat"]
    parts = [part for row in voice_chat for m in row["messages"] if m["role"] == "user" for part in m["content"]]
    assert {part["type"] for part in parts} == {"audio"}


def test_text_alone_cannot_tell_chosen_from_rejected(corpus: Path) -> None:
    for name in ("dpo.train.jsonl", "dpo.dev.jsonl"):
        rows = lines(corpus, name)
        seen: Counter[tuple[str, str, str]] = Counter()
        for row in rows:
            written = [part["text"] for part in row["prompt"][0]["content"] if part["type"] == "text"]
            seen[" ".join(written), row["chosen"], row["rejected"]] += 1
            assert len(row["chosen"].split()) == len(row["rejected"].split())
            assert abs(len(row["chosen"]) - len(row["rejected"])) <= 3
        # whatever a text-only scorer prefers, it is wrong on the twin with the answers swapped
        assert all(seen[prompt, rejected, chosen] == count for (prompt, chosen, rejected), count in seen.items())
