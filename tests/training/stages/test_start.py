"""Where a stage starts from (`init_from`), and what an adapter leaves alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2AudioForConditionalGeneration

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.model import build
from qwen2audio_train.training.checkpoints.folder import weights_folder
from qwen2audio_train.training.stages.run import fit
from tests.runs import build_trainer, logged, recipe, train

SHORT = ["trainer.max_steps=2"]
LORA = ["adapter.kind=lora", "adapter.r=2", "trainer.learning_rate=0.1"]


@pytest.fixture(scope="module")
def base(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the whole model."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    train(recipe(noise, run_dir, *SHORT))
    return run_dir


@pytest.fixture(scope="module")
def adapted(noise: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of an adapter on it."""
    run_dir = tmp_path_factory.mktemp("adapted") / "run"
    train(recipe(noise, run_dir, *SHORT, *LORA, f"init_from={base}"))
    return run_dir


def state_at_start(noise: Path, run_dir: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Weights of a run before its first step, under the names of the modules."""
    trainer = build_trainer(recipe(noise, run_dir, *SHORT, *overrides))
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def stock(folder: Path) -> dict[str, torch.Tensor]:
    """Weights as plain transformers loads them."""
    return Qwen2AudioForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("below", ["", "checkpoint-2", "checkpoint-2/model"])
def test_a_run_a_checkpoint_and_a_model_folder_are_starts(below: str, noise: Path, base: Path, tmp_path: Path) -> None:
    found = state_at_start(noise, tmp_path, f"init_from={base / below}")
    expected = stock(base / "checkpoint-2" / "model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_folder_means_its_newest_complete_checkpoint(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(base / "checkpoint-2", tmp_path / "checkpoint-10")
    assert weights_folder(str(tmp_path)) == str(tmp_path / "checkpoint-10" / "model")
    (tmp_path / "checkpoint-10" / "scheduler.pt").unlink()
    assert weights_folder(str(tmp_path)) == str(tmp_path / "checkpoint-2" / "model")


@pytest.mark.parametrize("below", ["", "checkpoint-2", "checkpoint-2/adapter"])
def test_an_adapter_is_merged_where_none_is_trained(
    below: str, noise: Path, base: Path, adapted: Path, tmp_path: Path
) -> None:
    """The merged weights are those of plain transformers and peft, and all of them are trained on."""
    found = state_at_start(noise, tmp_path, f"init_from={adapted / below}")
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(base / "checkpoint-2" / "model")
    merged = PeftModel.from_pretrained(plain, adapted / "checkpoint-2" / "adapter").merge_and_unload().state_dict()
    assert found.keys() == merged.keys()
    for name, value in merged.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-6), name
    changed = [
        name for name, value in stock(base / "checkpoint-2" / "model").items() if not torch.equal(found[name], value)
    ]
    assert changed
    assert all("language_model.layers" in name for name in changed)
    trainer = build_trainer(recipe(noise, tmp_path, f"init_from={adapted}"))
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if not n.endswith("embed_positions.weight"))


def test_an_adapter_goes_on_where_one_is_trained(noise: Path, adapted: Path, tmp_path: Path) -> None:
    trainer = build_trainer(recipe(noise, tmp_path, *SHORT, *LORA, f"init_from={adapted}"))
    saved = load_file(adapted / "checkpoint-2" / "adapter" / "adapter_model.safetensors")
    own = trainer.model.state_dict()
    for name, value in saved.items():
        assert torch.equal(own[name.replace(".weight", ".default.weight")], value), name
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_an_adapter_of_another_shape_is_not_silently_replaced(noise: Path, adapted: Path, tmp_path: Path) -> None:
    """What is trained is the saved adapter; asking for another rank beside it is a contradiction."""
    with pytest.raises(ConfigError, match=r"adapter\.r=3, and the adapter in .* has r=2"):
        build_trainer(recipe(noise, tmp_path, *SHORT, *LORA, "adapter.r=3", f"init_from={adapted}"))


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("/no/where", "/no/where: no such folder, and not a hub id"),
        ("./nowhere", "./nowhere: no such folder"),
        ("a/b/c", "a/b/c: no such folder"),
        ("EMPTY", "no weights here; expected config.json, adapter_config.json, a checkpoint, or a run folder"),
    ],
)
def test_nonsense_is_refused(start: str, says: str, noise: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    chosen = str(tmp_path / "empty") if start == "EMPTY" else start
    with pytest.raises(ConfigError, match=says):
        build_trainer(recipe(noise, tmp_path / "run", f"init_from={chosen}"))


def test_a_hub_id_that_is_not_there_says_so(noise: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_from=nobody/nothing: no tokenizer could be loaded from there"):
        build_trainer(recipe(noise, tmp_path / "run", "init_from=nobody/nothing"))


def test_an_adapter_without_its_base_is_refused(noise: Path, adapted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapted / "checkpoint-2" / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ConfigError, match="names no base model"):
        build_trainer(recipe(noise, tmp_path / "run", f"init_from={folder}"))
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/model"}))
    with pytest.raises(ConfigError, match="/gone/model"):
        build_trainer(recipe(noise, tmp_path / "run", f"init_from={folder}"))


# What an adapter leaves alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "modules", [["language_model"], ["audio_tower"], ["language_model", "multi_modal_projector", "audio_tower"]]
)
def test_an_adapter_touches_what_it_names_and_nothing_else(
    modules: list[str], noise: Path, base: Path, tmp_path: Path
) -> None:
    chosen = f"adapter.modules=[{','.join(modules)}]"
    config = recipe(noise, tmp_path, *SHORT, *LORA, chosen, f"init_from={base}")
    trainer = build_trainer(config)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    fit(trainer, config)
    after = trainer.model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    parts = {part for part in ("audio_tower", "multi_modal_projector", "language_model") for n in changed if part in n}
    assert parts == set(modules)


def test_qlora_holds_the_language_model_alone_in_four_bits(noise: Path, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = train(recipe(noise, tmp_path, "adapter.kind=qlora", "adapter.r=2", f"init_from={base}"))
    kinds = {name: type(module).__name__ for name, module in trainer.model.named_modules() if "q_proj" in name}
    assert {kind for name, kind in kinds.items() if name.endswith("base_layer")} == {"Linear4bit"}
    assert {kind for name, kind in kinds.items() if "audio_tower" in name} == {"Linear"}
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_qlora_says_what_it_needs(noise: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adapter\.kind=qlora: needs the package bitsandbytes"):
        build_trainer(recipe(noise, tmp_path, "adapter.kind=qlora", f"init_from={base}"))


def test_modules_to_save_are_trained_in_full(noise: Path, base: Path, tmp_path: Path) -> None:
    overrides = ["adapter.modules_to_save=[multi_modal_projector]", f"init_from={base}"]
    config = recipe(noise, tmp_path, *SHORT, *LORA, *overrides)
    trainer = build_trainer(config)
    fit(trainer, config)
    saved = load_file(tmp_path / "checkpoint-2" / "adapter" / "adapter_model.safetensors")
    whole = {name for name in saved if "lora_" not in name}
    assert len(whole) == 2
    assert all("multi_modal_projector" in name for name in whole)
    start = stock(base / "checkpoint-2" / "model")["model.multi_modal_projector.linear.weight"]
    (weight,) = [saved[name] for name in whole if name.endswith("weight")]
    assert not torch.equal(weight, start)


def test_frozen_parts_stay_as_they_are(noise: Path, base: Path, tmp_path: Path) -> None:
    overrides = ["model.freeze.audio_tower=true", "model.freeze.embed_tokens=true", "trainer.weight_decay=0.1"]
    config = recipe(noise, tmp_path, *SHORT, *overrides, f"init_from={base}")
    before, trainer = stock(base / "checkpoint-2" / "model"), train(config)
    for name, value in trainer.model.state_dict().items():
        frozen = "audio_tower" in name or "embed_tokens" in name
        assert torch.equal(value, before[name]) == frozen, name


def test_a_saved_adapter_loads_in_plain_peft(noise: Path, base: Path, adapted: Path, tmp_path: Path) -> None:
    """The same hidden states as our model with its adapter; the processor lies beside it."""
    folder = adapted / "checkpoint-2" / "adapter"
    plain = Qwen2AudioForConditionalGeneration.from_pretrained(base / "checkpoint-2" / "model")
    loaded = PeftModel.from_pretrained(plain, folder).eval()
    ours = build_trainer(recipe(noise, tmp_path, *SHORT, *LORA, f"init_from={adapted}")).model.eval()
    processor = AutoProcessor.from_pretrained(folder)
    ids = processor.tokenizer("red green blue", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=ids).logits, ours(input_ids=ids).logits, atol=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("model")


def test_a_longer_chain_of_starts(noise: Path, adapted: Path, tmp_path: Path) -> None:
    """An adapter on top of a merged adapter: the new one names a base that holds the merged weights."""
    config = recipe(noise, tmp_path / "full", *SHORT, f"init_from={adapted}")
    train(config)
    assert (tmp_path / "full" / "checkpoint-2" / "model" / "model.safetensors").is_file()
    train(recipe(noise, tmp_path / "lora", *SHORT, *LORA, f"init_from={tmp_path}/full"))
    saved = json.loads((tmp_path / "lora" / "checkpoint-2" / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "full" / "checkpoint-2" / "model")
    assert len(logged(config, "loss")) == 2
