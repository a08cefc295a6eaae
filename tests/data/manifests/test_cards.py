"""The cards of the public corpora: complete, every value sourced or marked as unverified, usable as configs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.data.examples import Clip, TaskExample
from qwen2audio_train.data.manifests.manifest import COMMON_KEYS, TASK_KEYS, read_manifest
from qwen2audio_train.data.prompts.pools import choose_prompt, prompt_fields, task_names

ROOT = Path(__file__).parents[3] / "data_manifests"
CARDS = sorted((ROOT / "cards").glob("*.yaml"))
SAMPLES = sorted((ROOT / "samples").glob("*.jsonl"))
CORPORA = {
    "LibriSpeech", "AISHELL-1", "AISHELL-2", "Common Voice 15", "FLEURS", "CoVoST 2", "MELD", "VocalSound",
    "CochlScene", "Clotho-AQA", "AudioCaps", "Clotho", "MusicCaps", "NSynth", "WavCaps", "AIR-Bench",
}  # fmt: skip
SECTIONS = ["name", "sources", "facts", "columns", "splits", "tasks", "configs", "traps"]
FACTS = ["hub_id", "homepage", "audio", "licence", "languages", "sampling_rate", "hours"]
RESERVED = {"unverified", "project"}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def entries(card: dict[str, Any]) -> Iterator[tuple[str, set[str], dict[str, Any]]]:
    """Every sourced entry of a card: where it stands, the keys that it needs beside `source`, the entry."""
    for section, needed in (("facts", {"value"}), ("columns", {"type"}), ("splits", {"examples", "hours"})):
        for key, entry in card[section].items():
            yield f"{section}.{key}", needed, entry
    for task, about in card["tasks"].items():
        for index, entry in enumerate(about["prompts"]):
            yield f"tasks.{task}.prompts[{index}]", {"value"}, entry
        for key in ("metric", "evaluated_on"):
            yield f"tasks.{task}.{key}", {"value"}, about[key]
    for index, entry in enumerate(card["traps"]):
        yield f"traps[{index}]", {"value"}, entry


def named_sources(entry: dict[str, Any]) -> list[str]:
    """The names that an entry gives as its source: one, several, or one per field of the entry."""
    source = entry["source"]
    if isinstance(source, dict):
        assert source.keys() <= entry.keys(), f"sources of fields that it does not have: {source}"
        return list(source.values())
    return source if isinstance(source, list) else [source]


def test_every_corpus_has_one_card() -> None:
    names = [load(path)["name"] for path in CARDS]
    assert sorted(names) == sorted(CORPORA)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_card_has_all_sections_and_facts_in_order(path: Path) -> None:
    card = load(path)
    assert list(card) == SECTIONS
    assert list(card["facts"]) == FACTS
    assert card["splits"]
    assert card["columns"]
    assert card["traps"]
    assert all(list(about) == ["prompts", "metric", "evaluated_on"] for about in card["tasks"].values())


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_every_value_names_its_source_or_is_unverified(path: Path) -> None:
    card = load(path)
    shared = load(ROOT / "sources.yaml")
    known = RESERVED | card["sources"].keys() | shared.keys()
    used: set[str] = set()
    for place, needed, entry in entries(card):
        assert needed <= entry.keys() <= needed | {"source", "note"}, place
        assert entry.keys() >= {"source"}, f"{place} has no source"
        names = named_sources(entry)
        assert names, f"{place} has an empty source"
        assert set(names) <= known, f"{place}: no such source: {sorted(set(names) - known)}"
        used |= set(names)
    assert card["sources"].keys() <= used, f"sources that nothing names: {sorted(card['sources'].keys() - used)}"
    assert not card["sources"].keys() & (RESERVED | shared.keys())


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_source_says_where_and_what_was_read(path: Path) -> None:
    for name, text in (load(path)["sources"] | load(ROOT / "sources.yaml")).items():
        assert ": " in text or "(" in text, f"{name} does not say what was read"
        assert len(text) > 30, name


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_configs_fit_the_schema_and_name_columns_that_exist(path: Path) -> None:
    card = load(path)
    assert card["configs"]
    fields = {*COMMON_KEYS, *TASK_KEYS} - {"meta"}
    for name, config in card["configs"].items():
        merged = OmegaConf.merge(OmegaConf.structured(SourceConfig), config)  # refuses unknown keys and wrong types
        assert merged.path, name
        assert merged.columns.keys() <= fields
        assert set(merged.columns.values()) <= card["columns"].keys()
        assert merged.constants.keys() <= fields - merged.columns.keys()
        assert merged.constants.task in card["tasks"]
        if merged.format == "huggingface":
            assert merged.columns.keys() >= {"audio", "target"}


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_tasks_are_the_project_s_and_prompts_those_of_its_pools(path: Path) -> None:
    card = load(path)
    assert set(card["tasks"]) <= set(task_names())
    for config in card["configs"].values():
        constants = config["constants"]
        example = TaskExample(
            id="x", clip=Clip("x.wav", 1.0), task=constants["task"], language=constants.get("language"), target="x",
            source="x", text_language=constants.get("text_language"), question="{question}",
        )  # fmt: skip
        template = choose_prompt(example, "natural", seed=0, most=1)
        text = (template.prompt + template.answer_prefix).format(**prompt_fields(example))
        assert text in [entry["value"] for entry in card["tasks"][constants["task"]]["prompts"]]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_sample_manifests_are_valid(path: Path) -> None:
    examples = read_manifest(path)
    assert examples
    assert len({example.id for example in examples}) == len(examples)


def test_the_readme_lists_every_task_and_every_section() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [task for task in task_names() if f"| `{task}` |" not in text] == []
    assert [section for section in SECTIONS if f"| `{section}` |" not in text] == []
