"""A frozen tower's outputs on disk, as a recipe asks for: the second epoch does not run it; nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.model.encoder_cache import EncoderCache
from qwen2audio_train.training.stages.arguments import training_arguments
from tests.runs import build_trainer, logged, recipe, train

EPOCHS = ("trainer.max_steps=8", "model.freeze.audio_tower=true", "data.tokens_per_pack=200")
"""36 clips in packs of some ten: eight steps see each of them more than once."""


def test_a_second_epoch_does_not_run_the_tower(noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    run = EncoderCache._run

    def counted(self: Any, listen: Any, slots: Any, clip_frames: Any) -> Any:
        encoded.append(len(clip_frames))
        return run(self, listen, slots, clip_frames)

    monkeypatch.setattr(EncoderCache, "_run", counted)
    cached = (*EPOCHS, f"model.encoder_cache_dir={tmp_path}/cache")
    cold: Any = train(recipe(noise, tmp_path / "cold", *cached))
    cache = cold.model.model.encoder_cache
    assert sum(encoded) == cache.misses == 36
    assert cache.hits > 36
    warm = train(recipe(noise, tmp_path / "warm", *cached))
    assert sum(encoded) == 36
    assert warm.state.global_step == 8
    plain = recipe(noise, tmp_path / "plain", *EPOCHS)
    train(plain)
    figures = [logged(recipe(noise, tmp_path / name), "loss", "grad_norm") for name in ("cold", "warm")]
    assert figures[0] == figures[1]
    for ours, theirs in zip(figures[0], logged(plain, "loss", "grad_norm"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_limit_of_the_recipe_holds(noise: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    limit = ("model.encoder_cache_max_gib=0.00001", f"model.encoder_cache_dir={folder}")  # 10 kB
    trainer: Any = build_trainer(recipe(noise, tmp_path / "run", *EPOCHS, *limit))
    trainer.train()
    assert 0 < sum(file.stat().st_size for file in folder.glob("*/*")) < 0.00001 * 2**30 + 200


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("model.freeze.audio_tower=false",), "model.freeze.audio_tower=false: the tower is trained"),
        (("adapter.kind=lora", "adapter.modules=[language_model,audio_tower]"), "an adapter on audio_tower changes it"),
        (("adapter.kind=lora", "adapter.modules_to_save=[audio_tower]"), "an adapter on audio_tower changes it"),
        (("data.augment.speed=0.5",), "data.augment.speed: clips change from epoch to epoch"),
        (("deepspeed.stage=3",), "deepspeed.stage=3: every rank has to run the same modules"),
        (("stage=encoder",), "stage=encoder: the tower is trained"),
    ],
)
def test_what_a_cache_cannot_go_with_is_refused(
    overrides: tuple[str, ...], says: str, noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    config = recipe(noise, tmp_path, *EPOCHS, f"model.encoder_cache_dir={tmp_path}/cache", *overrides)
    with pytest.raises(ConfigError, match=rf"^model\.encoder_cache_dir and .*{says}"):
        training_arguments(config)


def test_an_adapter_elsewhere_leaves_the_tower_as_it_is(noise: Path, tmp_path: Path) -> None:
    adapter = ("adapter.kind=lora", "adapter.r=2", "model.freeze.audio_tower=false")
    config = recipe(noise, tmp_path / "run", *EPOCHS, f"model.encoder_cache_dir={tmp_path}/cache", *adapter)
    trainer: Any = train(config)
    assert trainer.model.base_model.model.model.encoder_cache.hits > 0
