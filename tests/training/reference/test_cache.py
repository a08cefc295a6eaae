"""The store of reference log-probabilities: what is written is found again by every rank, or not used at all."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from qwen2audio_train.training.reference.cache import (
    RECORD,
    ReferenceCache,
    ReferenceCacheError,
    reference_id,
    weights_digest,
)


def keys_of(*numbers: int) -> torch.Tensor:
    return torch.tensor([[-number, number << 40] for number in numbers])


def test_stored_pairs_are_found_by_the_next_process(tmp_path: Path) -> None:
    logps = torch.tensor([[-1.25, -2.5], [-3.0, -0.125]])
    cache = ReferenceCache(tmp_path / "cache", "a")
    cache.store(keys_of(1, 2), logps)
    cache.close()
    again = ReferenceCache(tmp_path / "cache", "a", rank=1)
    values, found = again.lookup(keys_of(2, 3, 1))
    assert found.tolist() == [True, False, True]
    assert torch.equal(values, torch.tensor([[-3.0, -0.125], [0.0, 0.0], [-1.25, -2.5]]))
    assert len(again) == 2


def test_missing_folder_is_an_empty_store(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path / "none", "a")
    assert len(cache) == 0
    assert not (tmp_path / "none").exists()
    values, found = cache.lookup(torch.zeros(0, 2, dtype=torch.int64))
    assert values.shape == (0, 2)
    assert found.shape == (0,)


def test_another_reference_is_refused(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "weights-1")
    cache.store(keys_of(1), torch.zeros(1, 2))
    with pytest.raises(ReferenceCacheError, match=r"weights-1.*weights-2"):
        ReferenceCache(tmp_path, "weights-2")


def test_a_torn_and_a_damaged_record_are_left_out(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "a")
    cache.store(keys_of(1, 2, 3), torch.arange(6.0).view(3, 2))
    cache.close()
    (part,) = tmp_path.glob("*.part")
    data = bytearray(part.read_bytes())
    data[-2 * RECORD.itemsize + 17] ^= 1  # a bit of the second record's figures
    part.write_bytes(data[:-5])  # the third is torn
    again = ReferenceCache(tmp_path, "a")
    assert again.num_damaged == 2
    assert again.lookup(keys_of(1, 2, 3))[1].tolist() == [True, False, False]


def test_a_foreign_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(b"no header")
    with pytest.raises(ReferenceCacheError, match=r"x\.part"):
        ReferenceCache(tmp_path, "a")


def test_a_log_probability_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReferenceCacheError, match="not finite"):
        ReferenceCache(tmp_path, "a").store(keys_of(1), torch.tensor([[float("nan"), 0.0]]))


def write_pairs(folder: Path, rank: int) -> None:
    cache = ReferenceCache(folder, "a", rank)
    for number in range(100):
        cache.store(keys_of(1000 * rank + number), torch.tensor([[-float(rank), -float(number)]]))
    cache.close()


def test_ranks_write_at_the_same_time_and_lose_nothing(tmp_path: Path) -> None:
    context = get_context("fork")
    ranks = [context.Process(target=write_pairs, args=(tmp_path, rank)) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    cache = ReferenceCache(tmp_path, "a")
    assert (len(cache), cache.num_damaged) == (400, 0)
    assert cache.lookup(keys_of(3042))[0].tolist() == [[-3.0, -42.0]]


def test_digest_sees_every_weight_and_its_name() -> None:
    weights = {"b": torch.zeros(3, dtype=torch.bfloat16), "a": torch.ones(2, 2)}
    digest = weights_digest(weights.items())
    assert digest == weights_digest(reversed(weights.items()))
    assert digest != weights_digest({**weights, "a": torch.eye(2)}.items())
    assert digest != weights_digest({"c": weights["b"], "a": weights["a"]}.items())
    assert reference_id(digest, torch.bfloat16, 0.5) == f"{digest}/bfloat16/ld_alpha=0.5"
