"""What a word of the command line becomes in the config."""

from __future__ import annotations

import re

import pytest

from qwen2audio_train.cli.compose import given, readable
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
