"""The recipe over real recordings: its mappings fit the converter and the recordings, its stages compose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import load_config
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.prompts.pools import task_names
from qwen2audio_train.data.tools.convert import ConvertOptions, convert
from qwen2audio_train.training.chain import stage_overrides
from tests.launch.scripts import RECIPES, ROOT, script

MAPPINGS = sorted((ROOT / "data_manifests" / "recordings").glob("*.yaml"))
CORPUS = ROOT.parent / "shared" / "corpus"


@pytest.fixture
def recipe() -> Iterator[RecipeConfig]:
    with hydra.initialize_config_dir(str(RECIPES), version_base=None):
        yield load_config(hydra.compose("recipe_recordings"), RecipeConfig)


def test_every_stage_composes(recipe: RecipeConfig) -> None:
    names = list(recipe.stages)
    for before, name in zip([None, *names], names, strict=False):
        config = script("recipe").config_of(name, stage_overrides(recipe, name, before))
        assert config.stage.value == name
        assert config.run_dir == f"runs/recordings/{name}"
    for name in names[1:]:
        overrides = [*recipe.evaluate, *recipe.stages[name].evaluate]
        assert [key.split("=")[0] for key in overrides if key.startswith("manifests.")] == ["manifests.dev"]


def test_every_source_of_the_recipe_has_a_mapping(recipe: RecipeConfig) -> None:
    known = {mapping.stem for mapping in MAPPINGS}
    sources = script("recipe").config_of("pretrain", stage_overrides(recipe, "pretrain", None)).data.sources
    assert set(sources) == known
    for name, source in sources.items():
        assert source.path == [f"data_cache/recordings/{name}.train.jsonl"]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=lambda path: path.stem)
def test_mapping(mapping: Path, tmp_path: Path) -> None:
    table = CORPUS / mapping.stem / "manifest.jsonl"
    paths = OmegaConf.create({"input": str(table), "output": str(tmp_path / "train.jsonl")})
    options = load_config(OmegaConf.merge(OmegaConf.load(mapping), paths), ConvertOptions)
    assert options.constants["source"] == mapping.stem
    assert options.constants["task"] in task_names()
    if not table.is_file():
        pytest.skip("the recordings are not there")
    options.where["split"] = "train"
    result = convert(options)
    assert result.errors == []
    examples = read_manifest(options.output)
    assert len(examples) == result.written > 0
    assert {example.source for example in examples} == {mapping.stem}
