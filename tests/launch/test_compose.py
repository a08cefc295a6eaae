"""What a word of the command line becomes in the config."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

from qwen2audio_train.cli.compose import given, own_folder, readable
from qwen2audio_train.config.schema import ConfigError, StageConfig
from qwen2audio_train.data.tools.convert import ConvertOptions
from tests.launch.scripts import composed

TEXTS = (
    *("no", "007", "1e3", "1_000", "12:30", "a=b", "{x: 1}"),
    *('it\'s [1] (of 2), "so"', "back\\slash", "at its end \\"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_it_is_written(text: str) -> None:
    assert composed("pretrain", f"run_dir={text}").run_dir == text
    options = given(["input=a", "output=b", f"constants.language={text}", f"revision={text}"], ConvertOptions)
    assert (options.constants, options.revision) == ({"language": text}, text)


def test_text_can_be_quoted_taken_away_and_refer_to_other_keys() -> None:
    config = composed("pretrain", "run_dir='quoted'", "name=mine", "model.path=null", "tracker.project=${name}")
    assert (config.run_dir, config.model.path, config.tracker.project) == ("quoted", None, "mine")


def test_values_of_other_types_are_read_as_in_a_recipe() -> None:
    options = given(["input=a", "output=b", "skip_bad=true", "num_workers=3", "columns={id: a}"], ConvertOptions)
    assert (options.skip_bad, options.num_workers, options.columns) == (True, 3, {"id": "a"})


def test_the_hint_is_a_value_that_is_taken() -> None:
    with pytest.raises(ConfigError, match=re.escape("path='[\"...\"]'")):
        readable("data.sources.a.path=[my (1).jsonl]", StageConfig)
    config = composed("pretrain", 'data.sources.a.path=["my (1).jsonl"]')
    assert config.data.sources["a"].path == ["my (1).jsonl"]


@pytest.mark.parametrize(
    ("overrides", "ablation", "mode", "expected"),
    [
        ([], None, RunMode.RUN, "runs/sft"),
        (["ablation=loss_per_sample"], "loss_per_sample", RunMode.RUN, "runs/sft-loss_per_sample"),
        (["++run_dir=here", "ablation=loss_per_sample"], "loss_per_sample", RunMode.RUN, "runs/sft"),
        (["++trainer.learning_rate=1e-4"], None, RunMode.MULTIRUN, "runs/sft-trainer.learning_rate=1e-4"),
        (["++data.cache_dir='" + "x" * 200 + "'"], None, RunMode.MULTIRUN, "runs/sft-job3"),
    ],
)
def test_ablations_and_jobs_of_a_sweep_have_folders_of_their_own(
    overrides: list[str], ablation: str | None, mode: RunMode, expected: str
) -> None:
    names = SimpleNamespace
    told = names(task=overrides)
    choices = {"ablation": ablation}
    hydra_config = names(overrides=told, runtime=names(choices=choices), mode=mode, job=names(num=3))
    assert own_folder("runs/sft", hydra_config) == expected
