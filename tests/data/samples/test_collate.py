"""The packed batch, compared with hand-written ones, and its algebra."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2audio_train.data.samples.collate import indexed, pack, pack_preference, task_weights
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO, clip_index, mel_columns, num_audio_tokens
from qwen2audio_train.layout import MIN_FRAMES


def make_sample(
    ids: list[int],
    labelled: list[int],
    frames: tuple[int, ...] = (),
    slots: list[int] | None = None,
    branches: tuple[list[int], ...] = (),
    source_id: int = 0,
    weight: float = 1.0,
) -> Sample:
    return Sample(
        id="x",
        source="s",
        task="asr",
        input_ids=np.array(ids),
        label_mask=np.isin(np.arange(len(ids)), labelled),
        audio_slot=np.array(slots or [], dtype=np.int64),
        branches=tuple(np.array(branch) for branch in branches),
        mels=tuple(np.full((128, mel_columns(length)), length, dtype=np.float32) for length in frames),
        clip_frames=frames,
        source_id=source_id,
        weight=weight,
    )


AUDIO = replace(make_sample([9, 9, 5, 6], labelled=[3], frames=(6,), slots=[0, 1]), transcript=np.array([6, 6]))
TEXT = make_sample([7, 8], labelled=[1], source_id=1)
TREE = make_sample([1, 2], [], branches=([3, 4], [5]))


def lists(batch: dict[str, Any]) -> dict[str, Any]:
    """All but the spectrogram."""
    return {key: value if isinstance(value, int) else value.tolist() for key, value in batch.items() if key != "mel"}


def test_literal_batch() -> None:
    batch = pack([AUDIO, TEXT])
    assert lists(batch) == {
        "input_ids": [[9, 9, 5, 6, 7, 8]],
        "position_ids": [[0, 1, 2, 3, 0, 1]],
        "predict_from": [2, 4],
        "target": [6, 8],
        "weight": [1.0, 1.0],
        "source_id": [0, 1],
        "cu_q": [0, 4, 6],
        "cu_k": [0, 4, 6],
        "max_q": 4,
        "max_k": 4,
        "clip_frames": [6],
        "audio_slot": [0, 1],
        "transcript": [6, 6],
        "transcript_length": [2],
    }
    assert batch["mel"].shape == (128, mel_columns(6))
    kinds = {key: value.dtype for key, value in batch.items() if not isinstance(value, int)}
    assert {kinds.pop("weight"), kinds.pop("mel")} == {torch.float32}
    assert {kinds.pop("cu_q"), kinds.pop("cu_k")} == {torch.int32}
    assert set(kinds.values()) == {torch.int64}


def test_literal_index_of_clips() -> None:
    """Six frames and seven: 10 columns each, of which seven and eight are within; 3 and 4 frames."""
    index = {name: v if isinstance(v, int) else v.astype(int).tolist() for name, v in clip_index([6, 7]).items()}
    assert index == {
        "clip_outside": [0] * 7 + [1] * 3 + [0] * 8 + [1] * 2,
        "clip_columns": [0, 1, 2, 5, 6, 7, 8],
        "clip_positions": [0, 1, 2, 0, 1, 2, 3],
        "clip_cu": [0, 3, 7],
        "clip_longest": 4,
        "clip_pooled": [0, 1, 3, 4, 5, 6],
    }


def test_literal_tree() -> None:
    assert lists(pack([TREE])) == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "position_ids": [[0, 1, 2, 3, 2]],
        "predict_from": [1, 2, 1],
        "target": [3, 4, 5],
        "weight": [1.0, 1.0, 1.0],
        "source_id": [0, 0, 0],
        "cu_q": [0, 2, 4, 5],
        "cu_k": [0, 2, 6, 9],
        "max_q": 2,
        "max_k": 4,
        "key_index": [0, 1, 0, 1, 2, 3, 0, 1, 4],
        "clip_frames": [],
        "audio_slot": [],
        "transcript": [],
        "transcript_length": [],
    }


def test_literal_preference_batch() -> None:
    batch = pack_preference([TREE])
    assert batch.pop("pair_key").shape == (1, 2)
    assert lists(batch) == {
        "packed_ids": [[1, 2, 3, 4, 5]],
        "packed_positions": [[0, 1, 2, 3, 2]],
        "scatter": [[1, 2, 3], [1, 4, -1]],
        "input_ids": [[2, 3, 4], [2, 5, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "completion_mask": [[0, 1, 1], [0, 1, 0]],
        "pair_weight": [1.0],
        "cu_q": [0, 2, 4, 5],
        "cu_k": [0, 2, 6, 9],
        "max_q": 2,
        "max_k": 4,
        "key_index": [0, 1, 0, 1, 2, 3, 0, 1, 4],
        "clip_frames": [],
        "audio_slot": [],
    }


def test_several_rejected_answers_share_the_chosen_branch() -> None:
    many = make_sample([1, 2], [], branches=([3, 4], [5], [6, 7]))
    batch = pack_preference([many, TREE])
    assert batch["scatter"].tolist() == [
        [1, 2, 3],
        [1, 2, 3],
        [8, 9, 10],
        [1, 4, -1],
        [1, 5, 6],
        [8, 11, -1],
    ]
    assert batch["pair_weight"].tolist() == [1.0, 1.0, 1.0]
    first, second, third = batch["pair_key"].tolist()
    assert first == third != second  # the same id, prompt and answers have the same key


def test_answers_without_their_opposite_are_rows_of_their_own_the_desirable_ones_first() -> None:
    bad = replace(make_sample([1, 2], [], branches=([3, 4],)), task="undesirable")
    good = replace(make_sample([6], [], branches=([5],)), task="desirable")
    batch = pack_preference([bad, replace(TREE, task="preference"), good])
    assert lists(batch) == {
        "packed_ids": [[1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 5]],
        "packed_positions": [[0, 1, 2, 3, 0, 1, 2, 3, 2, 0, 1]],
        "scatter": [[5, 6, 7], [9, 10, -1], [1, 2, 3], [5, 8, -1]],
        "input_ids": [[2, 3, 4], [6, 5, 0], [2, 3, 4], [2, 5, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]],
        "completion_mask": [[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 0]],
        "label": [True, True, False, False],
        "pair_weight": [1.0] * 4,
        "cu_q": [0, 2, 4, 6, 8, 9, 10, 11],
        "cu_k": [0, 2, 6, 8, 12, 15, 16, 18],
        "max_q": 2,
        "max_k": 4,
        "key_index": [0, 1, 0, 1, 2, 3, 4, 5, 4, 5, 6, 7, 4, 5, 8, 9, 9, 10],
        "clip_frames": [],
        "audio_slot": [],
    }


def test_one_answer_is_no_preference() -> None:
    with pytest.raises(ValueError, match="a preference needs two or more"):
        pack_preference([AUDIO])


def test_fillers() -> None:
    filler = pack([])
    assert set(filler) == set(pack([AUDIO]))
    shapes = {key: tuple(value.shape) for key, value in filler.items() if not isinstance(value, int)}
    assert shapes == {
        "input_ids": (1, 1),
        "position_ids": (1, 1),
        "predict_from": (0,),
        "target": (0,),
        "weight": (0,),
        "source_id": (0,),
        "cu_q": (2,),
        "cu_k": (2,),
        "mel": (128, 0),
        "clip_frames": (0,),
        "audio_slot": (0,),
        "transcript": (0,),
        "transcript_length": (0,),
    }
    assert indexed(filler, QWEN2_AUDIO)["clip_outside"].shape == (mel_columns(MIN_FRAMES),)  # that of a dummy clip
    same = [key for key, value in pack([AUDIO]).items() if not isinstance(value, int)]
    assert all(filler[key].dtype == pack([AUDIO])[key].dtype for key in same)
    dummy = pack_preference([])
    assert set(dummy) == set(pack_preference([TREE]))
    assert dummy["pair_weight"].tolist() == [0.0]
    assert dummy["completion_mask"].tolist() == [[0, 1], [0, 1]]


def test_weightings() -> None:
    long = make_sample([1, 2, 3, 4, 5], labelled=[1, 2, 3, 4], weight=2.0)
    assert pack([long, TEXT])["weight"].tolist() == [2.0] * 4 + [1.0]
    assert pack([long, TEXT], "sample")["weight"].tolist() == [0.5] * 4 + [1.0]
    assert pack([TREE], "sample")["weight"].tolist() == pytest.approx([1 / 3] * 3)


def test_task_weights_balance_the_tasks() -> None:
    weights = task_weights({"asr": 0.9, "ser": 0.1})
    assert 0.9 * weights["asr"] == pytest.approx(0.5)
    assert 0.1 * weights["ser"] == pytest.approx(0.5)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    frames = draw(st.lists(st.integers(4, 40), max_size=2))
    slots = sum(num_audio_tokens(length) for length in frames)
    length = draw(st.integers(2, 6)) + slots
    labelled = draw(st.lists(st.integers(slots + 1, length - 1), unique=True))
    branch = st.lists(st.integers(0, 50), min_size=1, max_size=4)
    branches = draw(st.lists(branch, min_size=2, max_size=3) | st.just([]))
    ids = draw(st.lists(st.integers(0, 50), min_size=length, max_size=length))
    return make_sample(ids, labelled, tuple(frames), list(range(slots)), tuple(branches), draw(st.integers(0, 3)))


@given(left=st.lists(samples(), min_size=1, max_size=3), right=st.lists(samples(), min_size=1, max_size=3))
def test_packing_is_concatenation(left: list[Sample], right: list[Sample]) -> None:
    """pack(a + b) is pack(a) followed by pack(b) with its places moved on."""
    a, b, both = (pack(part, share_prefixes=False) for part in (left, right, left + right))
    tokens = a["input_ids"].shape[1]
    for key in ("input_ids", "position_ids", "target", "weight", "source_id", "mel", "clip_frames"):
        torch.testing.assert_close(both[key], torch.cat([a[key], b[key]], dim=-1), rtol=0, atol=0)
    for key in ("predict_from", "audio_slot"):
        assert both[key].tolist() == a[key].tolist() + (b[key] + tokens).tolist()
    for key in ("cu_q", "cu_k"):
        assert both[key].tolist() == a[key].tolist() + (b[key][1:] + a[key][-1]).tolist()
    keys = torch.cat([keys_of(a), keys_of(b) + tokens])
    assert keys_of(both).tolist() == keys.tolist()


def keys_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The keys of all segments in order; without trees they are the tokens themselves."""
    return batch.get("key_index", torch.arange(batch["input_ids"].shape[1]))


@given(batch=st.lists(samples(), min_size=1, max_size=4).map(pack))
def test_every_target_is_predicted_from_what_may_be_seen(batch: dict[str, torch.Tensor]) -> None:
    """Target m is the token whose position is one beyond that of predict_from[m], which is among its segment's keys."""
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    segment = torch.repeat_interleave(torch.arange(len(batch["cu_q"]) - 1), batch["cu_q"].diff().long())
    keys = keys_of(batch)
    for place, target in zip(batch["predict_from"].tolist(), batch["target"].tolist(), strict=True):
        follows = positions == positions[place] + 1
        sees = [place in keys[batch["cu_k"][s] : batch["cu_k"][s + 1]].tolist() for s in segment.tolist()]
        assert target in ids[follows & torch.tensor(sees)].tolist()
    assert batch["cu_q"][-1] == len(ids)
    assert batch["cu_k"][-1] == len(keys)
    assert batch["mel"].shape[1] == sum(mel_columns(length) for length in batch["clip_frames"].tolist())
