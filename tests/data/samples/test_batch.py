"""What collate gives is what batch.py says: keys, types and numbers of dimensions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch

from qwen2audio_train.batch import Batch, PackedBatch, PreferenceBatch, UnpairedBatch, tensors
from qwen2audio_train.data.examples import DESIRABLE, UNDESIRABLE
from qwen2audio_train.data.samples.collate import pack, pack_preference
from qwen2audio_train.data.samples.collate_kto import pack_unpaired
from tests.data.samples.test_collate import AUDIO, TEXT, TREE, make_sample

HEARD = make_sample([9, 9, 5], [], frames=(6,), slots=[0, 1], branches=([3, 4], [5]))
GOOD, BAD = (replace(make_sample([1, 2], [], branches=([3],)), task=task) for task in (DESIRABLE, UNDESIRABLE))
PAIRS: dict[str, tuple[Batch, type]] = {
    "pairs": (pack_preference([TREE, HEARD]), PreferenceBatch),
    "no pairs": (pack_preference([]), PreferenceBatch),
    "answers": (pack_preference([GOOD, BAD, TREE]), PreferenceBatch),
    "answers alone": (pack_unpaired([GOOD, HEARD], foreign=False), UnpairedBatch),
    "with foreign ones": (pack_unpaired([GOOD, HEARD]), UnpairedBatch),
}
BATCHES = PAIRS | {
    "samples": (pack([AUDIO, TEXT]), PackedBatch),
    "trees": (pack([TREE, HEARD]), PackedBatch),
    "none": (pack([]), PackedBatch),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_what_it_is_said_to_be(name: str) -> None:
    batch, kind = BATCHES[name]
    hints: dict[str, Any] = get_type_hints(kind, include_extras=True)
    assert batch.keys() <= hints.keys()
    assert batch.keys() >= kind.__required_keys__  # type: ignore[attr-defined]
    assert {key for key in batch if hints[key] is int} == {"max_q", "max_k"}
    for key, tensor in tensors(batch).items():
        hint = get_args(hints[key])[0] if get_origin(hints[key]).__name__ == "NotRequired" else hints[key]
        said, dtype, dimensions = get_args(hint)
        assert said is torch.Tensor
        assert (tensor.dtype, tensor.dim()) == (dtype, dimensions), key


def test_every_key_occurs() -> None:
    for kind in (PackedBatch, PreferenceBatch, UnpairedBatch):
        seen = {key for batch, of in BATCHES.values() if of is kind for key in batch}
        if kind is UnpairedBatch:
            seen.add("pair_key")  # what is left of the pairs
        assert seen == kind.__annotations__.keys()
