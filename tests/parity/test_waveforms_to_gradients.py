"""From waveforms to gradients: our features, batch and model against the stock extractor, padding and model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.samples.collate import pack
from qwen2audio_train.data.samples.sample import Sample
from qwen2audio_train.families.qwen2_audio import num_audio_tokens
from qwen2audio_train.layout import MAX_SAMPLES
from tests.model.rows import AUDIO_ID, IGNORED
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, pair, worst

BANDS = 128


def sample(rng: np.random.Generator, waveforms: list[np.ndarray]) -> Sample:
    """Text, clips, and a labelled answer."""
    features = [log_mel(waveform, BANDS) for waveform in waveforms]
    pieces = [rng.integers(0, AUDIO_ID, 4)]
    for _, frames in features:
        pieces += [np.full(num_audio_tokens(frames), AUDIO_ID), rng.integers(0, AUDIO_ID, 3)]
    answer = rng.integers(0, AUDIO_ID, 5)
    ids = np.concatenate([*pieces, answer])
    return Sample(
        id="x",
        source="x",
        task="asr",
        input_ids=ids,
        label_mask=np.arange(len(ids)) >= len(ids) - len(answer),
        audio_slot=np.flatnonzero(ids == AUDIO_ID),
        mels=tuple(mel for mel, _ in features),
        clip_frames=tuple(frames for _, frames in features),
    )


def stock_batch(samples: list[Sample], waveforms: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Rows padded on the right, spectrograms of 30 s."""
    extractor = WhisperFeatureExtractor(feature_size=BANDS)
    audio = extractor(
        waveforms, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt"
    )
    rows = [torch.from_numpy(s.input_ids) for s in samples]
    labels = [row.masked_fill(~torch.from_numpy(s.label_mask), IGNORED) for row, s in zip(rows, samples, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": padded(rows, batch_first=True),
        "attention_mask": padded([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": padded(labels, batch_first=True, padding_value=IGNORED),
        "input_features": audio["input_features"],
        "feature_attention_mask": audio["attention_mask"],
    }


@pytest.mark.parametrize(
    "lengths",
    [
        [[640], [16_000], [12_345]],
        [[801, 33_333], [], [7_919]],
        [[MAX_SAMPLES], [MAX_SAMPLES - 1], [MAX_SAMPLES - 161]],
    ],
    ids=["short", "two clips, none, one", "thirty seconds"],
)
def test_a_step_from_waveforms(lengths: list[list[int]]) -> None:
    rng = np.random.default_rng(0)
    waveforms = [[rng.standard_normal(n).astype(np.float32) * 0.1 for n in row] for row in lengths]
    samples = [sample(rng, row) for row in waveforms]
    stock, packed = pair(audio__num_mel_bins=BANDS)
    batch = stock_batch(samples, [waveform for row in waveforms for waveform in row])
    loss, grads = gradients(stock, stock(**batch).loss)
    out = packed(**pack(samples, num_mel_bins=BANDS))
    our_loss, our_grads = gradients(packed, out.nll_sum / out.weight_sum)
    assert torch.allclose(our_loss, loss, rtol=RELATIVE_TOLERANCE, atol=0.0)
    name, gap = worst(our_grads, grads)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"
