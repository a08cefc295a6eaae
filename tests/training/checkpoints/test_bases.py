"""Weights that others build on are told by their content, kept while they are in use, and looked for where they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints import writing
from qwen2audio_train.training.checkpoints.folder import CheckpointError, weights_folder
from qwen2audio_train.training.stages.policy import load_for_inference
from tests.runs import pairs_recipe, recipe, train

SHORT = ["trainer.max_steps=2", "trainer.save_strategy=steps", "trainer.save_steps=1", "trainer.save_total_limit=1"]
LORA = ["adapter.kind=lora", "adapter.r=2", "trainer.learning_rate=0.1"]


@pytest.fixture(scope="module")
def trained(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a run of the whole model, and `adapted`, an adapter on it."""
    home = tmp_path_factory.mktemp("trained")
    train(recipe(noise, home / "base", *SHORT))
    train(recipe(noise, home / "adapted", *SHORT, *LORA, f"init_from={home}/base"))
    return home


@pytest.fixture
def home(trained: Path) -> Path:
    """The same two runs, put back as they were afterwards."""
    kept = trained.with_name(f"{trained.name}-kept")
    shutil.copytree(trained, kept)
    yield trained
    shutil.rmtree(trained)
    kept.rename(trained)


def change_weights(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    save_file({name: value + 1 for name, value in state.items()}, model / "model.safetensors", {"format": "pt"})


def test_an_adapter_is_not_put_on_other_weights(noise: Path, home: Path, tmp_path: Path) -> None:
    base = home / "base" / "checkpoint-2" / "model"
    change_weights(base)
    (base.parent / folders.MANIFEST).unlink()  # as a rerun would have written it anew
    says = (
        r"adapted/checkpoint-2/adapter: this adapter was trained on other weights than .* \(model\.safetensors: sha256"
    )
    with pytest.raises(ConfigError, match=says):
        load_for_inference(str(home / "adapted"))
    with pytest.raises(ConfigError, match=says):
        train(recipe(noise, tmp_path, *SHORT, f"init_from={home}/adapted"))
    with pytest.raises(CheckpointError, match=r"the run started from .* hold something else now: model\.safetensors"):
        train(recipe(noise, home / "adapted", *SHORT, *LORA, f"init_from={home}/base", "trainer.max_steps=3"))


def test_a_base_in_use_is_not_rotated_away(noise: Path, home: Path) -> None:
    train(recipe(noise, home / "base", *SHORT, "trainer.max_steps=4"))
    kept = sorted(path.name for path in (home / "base").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    load_for_inference(str(home / "adapted"))
    # Going on, the adapter stays on what it started from, not on what `init_from` means by now.
    train(recipe(noise, home / "adapted", *SHORT, *LORA, f"init_from={home}/base", "trainer.max_steps=3"))
    shutil.rmtree(home / "adapted")
    writing.rotate(home / "base", keep=1)
    assert [path.name for path in (home / "base").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_base_that_is_gone_is_named_with_its_adapter(home: Path) -> None:
    shutil.rmtree(home / "base" / "checkpoint-2")
    with pytest.raises(
        ConfigError, match=r"adapted/checkpoint-2/adapter: the weights that this adapter was trained on"
    ):
        load_for_inference(str(home / "adapted"))


def test_a_relative_start_works_from_elsewhere(
    noise: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    train(recipe(noise, tmp_path / "run", *SHORT, *LORA, "init_from=base"))
    monkeypatch.chdir(tmp_path)
    load_for_inference("run")
    named = json.loads((tmp_path / "run" / "checkpoint-2" / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(trained / "base" / "checkpoint-2" / "model")


def test_a_local_released_model_is_known_by_its_content(noise: Path, trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "base" / "checkpoint-2" / "model", model)
    local = ["model.kind=released", f"model.path={model}"]
    train(recipe(noise, tmp_path / "run", *SHORT, *LORA, *local))
    lineage = json.loads((tmp_path / "run" / "checkpoint-2" / "lineage.json").read_text())
    assert lineage["base"] == {"model.safetensors": folders.checksum(model / "model.safetensors")}
    change_weights(model)
    with pytest.raises(CheckpointError, match="hold something else now"):
        train(recipe(noise, tmp_path / "run", *SHORT, *LORA, *local, "trainer.max_steps=3"))


def test_a_preference_run_keeps_its_reference(noise: Path, home: Path, tmp_path: Path) -> None:
    """Full fine-tuning too: the reference is what it started from, or nothing."""
    run = [*SHORT, f"init_from={home}/base", "data.tokens_per_pack=200"]
    train(pairs_recipe(noise, tmp_path / "run", *run))
    train(recipe(noise, home / "base", *SHORT, "trainer.max_steps=3"))
    train(pairs_recipe(noise, tmp_path / "run", *run, "trainer.max_steps=3"))
    lineage = json.loads((tmp_path / "run" / "checkpoint-3" / "lineage.json").read_text())
    assert lineage["start"] == str(home / "base" / "checkpoint-2" / "model")
    shutil.rmtree(home / "base" / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"the reference is measured from .* hold something else now"):
        train(pairs_recipe(noise, tmp_path / "run", *run, "trainer.max_steps=4"))


def test_damaged_weights_are_not_scored(home: Path) -> None:
    change_weights(home / "base" / "checkpoint-2" / "model")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: differs from MANIFEST\.json"):
        load_for_inference(str(home / "base"))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("runs/bsae", r"no folder runs/bsae here, and runs/ is a folder, so it is no hub id; did you mean runs/base\?"),
        ("exported", r"exported: no such folder, and not a hub id"),
        ("runs/base/checkpoint-9", "no such folder, and not a hub id"),
        ("runs/m.jsonl", r"runs/m\.jsonl: is a file; expected a folder of weights"),
    ],
)
def test_a_misspelt_folder_is_not_asked_of_the_hub(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "base").mkdir(parents=True)
    (tmp_path / "runs" / "m.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=says):
        weights_folder(path)
    assert weights_folder("owner/name") == "owner/name"
