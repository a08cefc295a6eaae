from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen2audio_train.config.parts import FreezeConfig
from qwen2audio_train.model.encoder_cache import EncoderCache, weights_digest
from qwen2audio_train.model.freeze import set_trainable
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import pack, random_row, tiny_config

PLENTY = 10**9


@pytest.fixture
def model() -> PackedQwen2Audio:
    torch.manual_seed(0)
    model = PackedQwen2Audio(tiny_config())
    set_trainable(model, FreezeConfig(audio_tower=True))
    return model


def batch(*frames: tuple[int, ...]) -> dict[str, Tensor]:
    """Clips of the same length have the same content, whatever stands beside them."""
    return pack([random_row(torch.Generator().manual_seed(sum(f)), f) for f in frames])


def attach(model: PackedQwen2Audio, folder: Path, max_bytes: int = PLENTY) -> EncoderCache:
    model.model.encoder_cache = EncoderCache(folder, model.model.audio_tower, model.family, max_bytes)
    return model.model.encoder_cache


def test_loss_is_the_same_with_and_without(model: PackedQwen2Audio, tmp_path: Path) -> None:
    first, second = batch((40,), (7,)), batch((7,), (100,), (), (40,))
    plain = [model(**b).nll for b in (first, second)]
    cache = attach(model, tmp_path)
    cached = [model(**b).nll for b in (first, second, second)]
    for ours, theirs in zip(cached, [*plain, plain[1]], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert (cache.misses, cache.hits) == (3, 5)


def test_the_projector_still_learns(model: PackedQwen2Audio, tmp_path: Path) -> None:
    attach(model, tmp_path)
    for _ in range(2):
        model.zero_grad()
        model(**batch((40,))).nll_sum.backward()
        assert model.model.multi_modal_projector.linear.weight.grad.abs().sum() > 0


def test_another_process_finds_the_entries(model: PackedQwen2Audio, tmp_path: Path) -> None:
    attach(model, tmp_path)
    model(**batch((40,)))
    again = attach(model, tmp_path)
    model(**batch((40,)))
    assert (again.misses, again.hits) == (0, 1)


def test_other_weights_have_other_entries(model: PackedQwen2Audio, tmp_path: Path) -> None:
    attach(model, tmp_path)
    model(**batch((40,)))
    before = weights_digest(model.model.audio_tower)
    with torch.no_grad():
        model.model.audio_tower.layer_norm.bias[0] += 1e-3
    assert weights_digest(model.model.audio_tower) != before
    changed = attach(model, tmp_path)
    model(**batch((40,)))
    assert (changed.misses, changed.hits) == (1, 0)


def test_the_folder_stays_below_its_limit_and_goes_on_answering(model: PackedQwen2Audio, tmp_path: Path) -> None:
    limit = 6_000
    for _ in range(2):
        attach(model, tmp_path, limit)
        model(**batch((100,), (40,), (90,), (80,), (70,)))
    size = sum(file.stat().st_size for file in tmp_path.glob("*/*"))
    assert 0 < size < limit + 200  # an entry's header is counted once it is written
    assert model.model.encoder_cache.hits > 0
    assert model.model.encoder_cache.misses > 0


def test_a_damaged_entry_is_written_anew(model: PackedQwen2Audio, tmp_path: Path) -> None:
    attach(model, tmp_path)
    want = model(**batch((40,))).nll
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(model(**batch((40,))).nll, want)
    assert model.model.encoder_cache.misses == 2
    model(**batch((40,)))
    assert model.model.encoder_cache.hits == 1


def test_a_tower_that_is_trained_is_never_read_from_disk(model: PackedQwen2Audio, tmp_path: Path) -> None:
    cache = attach(model, tmp_path)
    set_trainable(model, FreezeConfig())
    model(**batch((40,))).nll_sum.backward()
    assert cache.misses == cache.hits == 0
    assert model.model.audio_tower.conv1.weight.grad.abs().sum() > 0
