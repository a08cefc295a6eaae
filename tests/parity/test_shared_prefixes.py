"""What is computed once for samples that begin alike: the same losses and gradients as sample by sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2audio_train.config.data import LossWeighting
from qwen2audio_train.data.samples.collate import indexed, pack, pack_preference
from qwen2audio_train.data.samples.collate_kto import pack_unpaired
from qwen2audio_train.data.samples.prefixes import MIN_SHARED
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO, mel_columns, num_audio_tokens
from tests.model.rows import AUDIO_ID, BANDS
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, pair, worst

SYSTEM = tuple(range(20))
"""What every chat begins with."""

MARKUP = tuple(range(20, 30))
"""What some of them go on with."""


def mel(seed: int, frames: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((BANDS, mel_columns(frames))).astype(np.float32)
    values[:, frames + 2 :] = 0.0  # what stands for the padding before the next clip
    return values


def sample(
    before: Sequence[int],
    answer: Sequence[int],
    clip: int | None = None,
    question: Sequence[int] = (),
    branches: Sequence[Sequence[int]] = (),
    weight: float = 1.0,
) -> Sample:
    """`before`, the clip of that seed (40 frames), a question and a labelled answer."""
    slots = num_audio_tokens(40) if clip is not None else 0
    ids = [*before, *[AUDIO_ID] * slots, *question, *answer]
    return Sample(
        id="x",
        source="s",
        task="paired" if branches else "chat",
        input_ids=np.array(ids),
        label_mask=np.arange(len(ids)) >= len(ids) - len(answer),
        audio_slot=len(before) + np.arange(slots),
        branches=tuple(np.array(branch) for branch in branches),
        mels=() if clip is None else (mel(clip, 40),),
        clip_frames=() if clip is None else (40,),
        weight=weight,
    )


CHATS = (
    sample((*SYSTEM, *MARKUP), (60, 61), clip=1, question=(40, 41, 42)),
    sample(SYSTEM, (62, 63, 64), question=(50, 51)),
    sample((*SYSTEM, *MARKUP), (65,), clip=1, question=(43, 44, 45), weight=3.0),
    sample((*SYSTEM, *MARKUP), (66, 67), clip=2),
    sample((70, 71, 72), (73, 74), clip=1),
    sample((*SYSTEM, *MARKUP), (60, 62), clip=1, question=(40, 41, 42)),
)


@pytest.mark.parametrize("weighting", LossWeighting)
def test_losses_and_gradients_are_those_of_separate_rows(weighting: LossWeighting) -> None:
    _, model = pair()
    results = []
    for shares in (True, False):
        batch = indexed(pack(CHATS, weighting, BANDS, shares), QWEN2_AUDIO)
        out = model(**batch)
        results.append((batch["target"], out.nll.detach(), gradients(model, out.nll_sum)))
    (targets, nll, (loss, ours)), (same_targets, expected, (total, theirs)) = results
    assert torch.equal(targets, same_targets)
    assert torch.allclose(nll, expected, rtol=RELATIVE_TOLERANCE)
    assert torch.allclose(loss, total, rtol=RELATIVE_TOLERANCE)
    name, gap = worst(ours, theirs)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"


def test_what_is_shared_stands_once() -> None:
    """The system turn five times, the markup four, the first clip and its 3 words three: one of each is left."""
    shared, apart = pack(CHATS, num_mel_bins=BANDS), pack(CHATS, num_mel_bins=BANDS, share_prefixes=False)
    clip = num_audio_tokens(40)
    saved = 4 * len(SYSTEM) + 3 * len(MARKUP) + 2 * clip
    # The first and the last chat share the question too, but three words are fewer than MIN_SHARED.
    assert MIN_SHARED == 8
    assert apart["input_ids"].shape[1] - shared["input_ids"].shape[1] == saved
    # The clip of the fifth stands behind other tokens, but it is heard as it was: on its own.
    assert shared["clip_frames"].tolist() == [40, 40, 40]
    assert len(shared["audio_slot"]) == 3 * clip
    assert (shared["input_ids"][0, shared["audio_slot"]] == AUDIO_ID).all()


def test_clips_with_a_transcript_are_heard_apart() -> None:
    """Each is a label of the CTC objective."""
    said = [Sample(**{**vars(chat), "transcript": np.array([5, 6])}) for chat in (CHATS[0], CHATS[2])]
    batch = pack(said, num_mel_bins=BANDS)
    assert batch["clip_frames"].tolist() == [40, 40]
    assert batch["transcript_length"].tolist() == [2, 2]


def test_a_clip_that_was_changed_is_another() -> None:
    louder = (CHATS[0].mels[0] + np.eye(*CHATS[0].mels[0].shape, dtype=np.float32) * 1e-3,)
    batch = pack([CHATS[0], Sample(**{**vars(CHATS[2]), "mels": louder})], num_mel_bins=BANDS)
    assert batch["clip_frames"].tolist() == [40, 40]


PAIRS = (
    sample((*SYSTEM, *MARKUP), (), clip=1, question=(40, 41), branches=((80, 81), (82,))),
    sample((*SYSTEM, *MARKUP), (), clip=2, question=(42,), branches=((83,), (84, 85), (86, 80))),
    sample(SYSTEM, (), question=(43, 44), branches=((87, 88, 89), (81,))),
)


@pytest.mark.parametrize("packer", [pack_preference, pack_unpaired])
def test_answers_are_read_as_from_separate_trees(packer: Any) -> None:
    _, model = pair()
    hidden = []
    for shares in (True, False):
        batch = indexed(packer(PAIRS, BANDS, share_prefixes=shares), QWEN2_AUDIO)
        scatters = [key for key in ("scatter", "KL_scatter") if key in batch]
        hidden.append([model.model(**{**batch, "scatter": batch[key]}).last_hidden_state.detach() for key in scatters])
    for ours, theirs in zip(*hidden, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@given(
    st.lists(
        st.tuples(st.integers(0, 25), st.integers(0, 2), st.sampled_from([None, 1, 2]), st.integers(1, 3)),
        min_size=1,
        max_size=6,
    )
)
@settings(deadline=None, max_examples=60)
def test_every_segment_attends_to_what_came_before_it_in_its_sample(parts: list[tuple[Any, ...]]) -> None:
    """Followed back through the keys of its segment, every labelled token has the prefix that its sample has."""
    samples = [
        sample((*(*SYSTEM, *MARKUP)[:length], 90 + kind), tuple(range(100, 100 + size)), clip)
        for length, kind, clip, size in parts
    ]
    batch = pack(samples, num_mel_bins=BANDS)
    ids, cu_q, cu_k = batch["input_ids"][0], batch["cu_q"].tolist(), batch["cu_k"].tolist()
    keys = batch.get("key_index", torch.arange(len(ids)))
    seen = Counter()
    for row in batch["predict_from"].tolist():
        segment = next(i for i in range(len(cu_q)) if cu_q[i] <= row < cu_q[i + 1])
        visible = keys[cu_k[segment] : cu_k[segment + 1] - (cu_q[segment + 1] - 1 - row)]
        assert batch["position_ids"][0, visible].tolist() == list(range(len(visible)))
        seen[tuple(ids[visible].tolist())] += 1
    expected = Counter(
        tuple(s.input_ids[:place].tolist()) for s in samples for place in np.flatnonzero(s.label_mask).tolist()
    )
    assert seen == expected
