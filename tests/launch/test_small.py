"""The recipe from real parts: its stages compose, hand on to each other, and train what they are meant to."""

from __future__ import annotations

from collections.abc import Iterator

import hydra
import pytest
from omegaconf import OmegaConf

from qwen2audio_train.config.parts import FreezeConfig
from qwen2audio_train.config.recipe import RecipeConfig
from qwen2audio_train.config.schema import StageConfig, load_config
from qwen2audio_train.pairs.make import SamplingOptions
from qwen2audio_train.pairs.questions import Question
from qwen2audio_train.pairs.score import scorer
from qwen2audio_train.training.chain import overrides_of
from tests.launch.scripts import RECIPES, script


@pytest.fixture(scope="module")
def recipe() -> Iterator[RecipeConfig]:
    with hydra.initialize_config_dir(str(RECIPES), version_base=None):
        yield load_config(hydra.compose("recipe_small"), RecipeConfig)


@pytest.fixture(scope="module")
def stages(recipe: RecipeConfig) -> dict[str, StageConfig]:
    return {name: script("recipe").config_of(name, overrides) for name, overrides in overrides_of(recipe).items()}


def test_every_stage_starts_from_the_one_before(stages: dict[str, StageConfig]) -> None:
    starts = {name: config.init_from for name, config in stages.items()}
    before = {"pretrain": "encoder", "sft": "pretrain", "dpo": "sft"}
    assert starts == {"encoder": None} | {name: f"runs/small/{one}" for name, one in before.items()}
    assert {config.data.selfmade.variant for config in stages.values()} == {"open"}


def test_each_stage_trains_its_parts(stages: dict[str, StageConfig]) -> None:
    """The warm-up leaves the language model alone, an adapter teaches it to listen, DPO moves it as a whole."""
    language_model = {"language_model": True, "embed_tokens": True, "lm_head": True}
    assert stages["encoder"].model.freeze == FreezeConfig(**language_model)
    assert stages["encoder"].adapter.kind == stages["dpo"].adapter.kind == "none"
    assert stages["pretrain"].adapter == stages["sft"].adapter
    assert stages["pretrain"].adapter.modules_to_save == ["multi_modal_projector"]
    heard = {"audio_tower": True, "multi_modal_projector": True}
    assert stages["dpo"].model.freeze == FreezeConfig(**language_model | heard | {"language_model": False})
    tower, projector = (
        stages["encoder"].optimizer.learning_rates["audio_tower"],
        stages["encoder"].trainer["learning_rate"],
    )
    assert tower < projector / 5  # or it forgets real speech


def test_text_is_replayed_and_scored_after_every_stage(recipe: RecipeConfig, stages: dict[str, StageConfig]) -> None:
    for name in ("pretrain", "sft"):
        assert stages[name].data.sources["text"].path == ["data_cache/selfmade/open/text.train.jsonl"]
    assert "manifests.text=data_cache/selfmade/open/text.dev.jsonl" in recipe.evaluate
    assert all(stage.decodes for stage in recipe.stages.values())


def test_the_pairs_that_are_sampled_are_trained_on(recipe: RecipeConfig, stages: dict[str, StageConfig]) -> None:
    options = load_config(OmegaConf.from_dotlist(recipe.stages["dpo"].pairs), SamplingOptions)
    assert options.manifests == ["data_cache/selfmade/open/questions.train.jsonl"]
    assert stages["dpo"].data.sources["sampled"].path == ["runs/small/dpo/../pairs.jsonl"]
    # a spoken question has no task of its own, and its answers are to be told apart all the same
    question = Question("q", prompt=(), reference="dogs eat meat.", task=None, language=None, source="voice_chat")
    ((right, wrong),) = scorer(options.score)([(question, ["Dogs eat meat.", "dogs bark."])])
    assert right is not None
    assert wrong is not None
    assert right > wrong + options.min_margin
