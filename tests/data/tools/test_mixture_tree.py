"""The mixture as a tree: shares, hours, tokens and fingerprints of groups and sources."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch import data as script
from qwen2audio_train.config.data import DataConfig, GroupConfig, SourceConfig
from qwen2audio_train.data.tools.mixture_tree import mixture_tree, tree_text
from qwen2audio_train.data.tools.stats import indexes_of
from qwen2audio_train.families.known import DEFAULT


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two groups; lengths stand in the manifests, no clip is there."""
    sources = {}
    for name, group, number, seconds in (
        ("en", "speech/asr", 30, 4.0),
        ("de", "speech/asr", 10, 4.0),
        ("rain", "", 5, 20.0),
    ):
        line = {"task": "asr" if group else "sec", "audio": "a.wav", "duration_s": seconds, "target": "x"}
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"id": f"{i}", **line}) + "\n" for i in range(number)))
        sources[name] = SourceConfig([str(path)], group=group, weight=0.2 if name == "rain" else None)
    sources["rain"].epochs = 2
    groups = {"speech": GroupConfig(weight=0.8)}
    return DataConfig(sources, groups=groups, num_workers=0, cache_dir=str(tmp_path / "cache"))


def test_shares_hours_and_tokens_add_up(data: DataConfig) -> None:
    root = mixture_tree(data, indexes_of(data, None, DEFAULT.name, "data.sources"))
    speech, rain = root.below
    (asr,) = speech.below
    assert [node.name for node in asr.below] == ["en", "de"]
    assert [node.share for node in (root, speech, *asr.below, rain)] == pytest.approx([1, 0.8, 0.6, 0.2, 0.2])
    assert (root.examples, speech.examples, asr.examples) == (45, 40, 40)
    assert (speech.seconds, rain.seconds, root.seconds) == (160, 100, 260)
    assert rain.audio_tokens == 5 * 500
    assert root.drawn_s == pytest.approx(0.8 * 4 + 0.2 * 20)
    assert rain.passes == 2
    lines = tree_text(root).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["mixture", "all"]
    assert lines[2].startswith("├─ speech/")
    assert lines[3].startswith("│  └─ asr/")
    assert lines[4].startswith("│     ├─ en ")
    assert lines[6].startswith("└─ rain")
    assert lines[6].split()[2:6] == ["20.0%", "55.6%", "5", "0.03"]


def test_a_fingerprint_changes_with_what_is_below_it_alone(data: DataConfig, tmp_path: Path) -> None:
    def prints(config: DataConfig) -> tuple[str, ...]:
        root = mixture_tree(config, indexes_of(config, None, DEFAULT.name, "data.sources"))
        speech, rain = sorted(root.below, key=lambda node: -len(node.below))
        return root.fingerprint, speech.fingerprint, rain.fingerprint

    before = prints(data)
    assert prints(data) == before
    weighted = prints(replace(data, groups={"speech": GroupConfig(weight=0.4)}))
    assert [a == b for a, b in zip(weighted, before, strict=True)] == [False, False, True]
    with (tmp_path / "rain.jsonl").open("a") as file:
        file.write(json.dumps({"id": "new", "task": "sec", "audio": "a.wav", "duration_s": 1, "target": "x"}) + "\n")
    changed = prints(data)
    assert [a == b for a, b in zip(changed, before, strict=True)] == [False, True, False]


def test_the_door_shows_the_mixture_of_a_recipe(data: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = data.sources["en"].path
    given = f"overrides=['data=none','data.sources.mine.path=[{path}]','data.cache_dir={data.cache_dir}']"
    assert script.main(["visualize", given]) == 0
    assert "└─ mine" in capsys.readouterr().out
