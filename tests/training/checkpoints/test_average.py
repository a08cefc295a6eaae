"""The mean of checkpoints: the numbers, what reads it, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2AudioForConditionalGeneration

from launch import average as script
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.checkpoints.average import AverageOptions, average
from qwen2audio_train.training.checkpoints.folder import CheckpointError
from tests.runs import recipe, train


@pytest.fixture(scope="module")
def run(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that has kept all of its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    train(recipe(noise, folder, "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=9"))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_is_the_mean_of_the_last_ones_and_a_start_for_more(run: Path, noise: Path, tmp_path: Path) -> None:
    output = tmp_path / "mean"
    assert script.main([f"run_dir={run}", "last=3", f"output_dir={output}"]) == 0
    parts = [weights(run / f"checkpoint-{step}" / "model") for step in (2, 3, 4)]
    found = weights(output)
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        assert torch.allclose(value, sum(part[name] for part in parts) / 3, atol=1e-7), name
    assert not torch.equal(found["language_model.lm_head.weight"], parts[-1]["language_model.lm_head.weight"])
    model = Qwen2AudioForConditionalGeneration.from_pretrained(output)
    assert torch.equal(model.lm_head.weight, found["language_model.lm_head.weight"])
    again = train(recipe(noise, tmp_path / "more", f"init_from={output}", "trainer.max_steps=1"))
    assert again.state.global_step == 1


def test_what_has_no_mean_is_refused(run: Path, tmp_path: Path) -> None:
    first, last = run / "checkpoint-1", run / "checkpoint-4"
    with pytest.raises(ConfigError, match="two checkpoints or more, found 1"):
        average(AverageOptions(checkpoints=[str(first)], output_dir=str(tmp_path / "mean")))
    with pytest.raises(ConfigError, match="is there already"):
        average(AverageOptions(checkpoints=[str(first), str(last)], output_dir=str(run)))
    other = tmp_path / "other"
    shutil.copytree(first / "model", other)
    state = weights(other)
    state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"][:-1].clone()
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has the shapes"):
        average(AverageOptions(checkpoints=[str(other), str(last)], output_dir=str(tmp_path / "mean")))
    (other / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="the mean of adapters is not that of weights"):
        average(AverageOptions(checkpoints=[str(other), str(last)], output_dir=str(tmp_path / "mean")))
    assert not (tmp_path / "mean").exists()
