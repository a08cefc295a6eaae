"""Text stays text on its way in: from recipe files, from mapping files and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen2audio_train.cli.compose import given
from qwen2audio_train.config.as_written import load_yaml
from qwen2audio_train.config.data import DataConfig
from qwen2audio_train.config.schema import ConfigError, StageConfig, load_config
from qwen2audio_train.data.tools.convert import ConvertOptions
from tests.launch.scripts import composed

WORDS = ["no", "off", "on", "yes", "true", "007", "1e3", "1.50", "0x1F", "2024-01-01", "null"]


@pytest.mark.parametrize("word", WORDS)
def test_a_label_is_the_word_that_was_written(word: str, tmp_path: Path) -> None:
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(f"constants: {{target: {word}}}\nwhere: {{{word}: {word}}}\ninput: a\noutput: {word}x\n")
    from_file = given([str(mapping)], ConvertOptions)
    assert (from_file.constants, from_file.where) == ({"target": word}, {word: word})
    pairs = ["input=a", "output=b", f"constants.target={word}", "num_workers=1", "skip_bad=yes"]
    from_pairs = given(pairs, ConvertOptions)
    assert (from_pairs.constants["target"], from_pairs.num_workers, from_pairs.skip_bad) == (word, 1, True)
    key = "data.sources.mine.constants.target"
    assert composed("pretrain", "data=none", f"{key}={word}").data.sources["mine"].constants == {"target": word}


def test_a_file_of_recipes(tmp_path: Path) -> None:
    """Names and settings of sources as they stand; numbers and truth values stay what they are."""
    text = """
        sources:
          no: {path: [a.jsonl], constants: {language: no, target: 007}, weight: 1e3, subset: off, streaming: no}
        tokens_per_pack: 120
    """
    data = load_config({"stage": "sft", "name": "x", "model": {"kind": "tiny"}, "data": load_yaml(text, DataConfig)},
                       StageConfig).data  # fmt: skip
    source = data.sources["no"]
    assert (source.constants, source.weight, source.subset) == ({"language": "no", "target": "007"}, 1000.0, "off")
    assert source.streaming is False
    assert data.tokens_per_pack == 120


def test_hydra_reads_the_recipes_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hydra

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("sources: {off: {path: [on], constants: {language: no}}}\n")
    (tmp_path / "root.yaml").write_text("defaults: [{data: mine}, _self_]\nname: 1e3\ntrainer: {max_steps: 3}\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        raw = hydra.compose("root")
    assert raw.data.sources == {"off": {"path": ["on"], "constants": {"language": "no"}}}
    assert (raw.name, raw.trainer.max_steps) == ("1e3", 3)


def test_a_value_inside_of_hydra_s_braces_is_refused_where_text_is_expected() -> None:
    with pytest.raises(ConfigError, match=r"constants\.target: true was read as a value, and text is expected"):
        composed("pretrain", "data=none", "data.sources.mine={path:[a],constants:{target:true}}")
