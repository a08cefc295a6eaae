"""Log-mel frames are those of the stock extractor, to the bit, at the clip's own length."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.families.qwen2_audio import mel_columns
from qwen2audio_train.layout import MAX_FRAMES, MAX_SAMPLES, num_frames


@cache
def extractor(num_mel_bins: int) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=num_mel_bins)


def stock(waveform: np.ndarray, num_mel_bins: int = 128) -> np.ndarray:
    return extractor(num_mel_bins)(waveform, sampling_rate=16_000, return_tensors="np").input_features[0]


def check(waveform: np.ndarray, num_mel_bins: int = 128) -> None:
    mel, frames = log_mel(waveform, num_mel_bins)
    visible = min(frames + 2, MAX_FRAMES)
    assert mel.dtype == np.float32
    assert mel.shape == (num_mel_bins, mel_columns(frames))
    assert frames == num_frames(len(waveform))
    np.testing.assert_array_equal(mel[:, :visible], stock(waveform, num_mel_bins)[:, :visible])
    assert not mel[:, visible:].any()


@pytest.mark.parametrize(
    "num_samples",
    [
        321,
        640,
        641,
        1_600,
        5_119,
        5_120,
        79_999,
        479_520,
        479_679,
        479_680,
        479_681,
        479_840,
        479_841,
        479_999,
        480_000,
    ],
)
def test_borders(num_samples: int) -> None:
    """29.97 s to 30 s is where the right border stops being silence."""
    check(np.random.default_rng(num_samples).normal(size=num_samples).astype(np.float32) * 0.1)


@settings(max_examples=25, deadline=None)
@given(num_samples=st.integers(640, MAX_SAMPLES), seed=st.integers(0, 9), level=st.sampled_from([1e-5, 0.01, 1.0]))
def test_any_length(num_samples: int, seed: int, level: float) -> None:
    check(np.random.default_rng(seed).normal(size=num_samples).astype(np.float32) * level)


def test_silence_and_fewer_bands() -> None:
    check(np.zeros(16_000, dtype=np.float32))
    check(np.random.default_rng(0).normal(size=16_000).astype(np.float32), num_mel_bins=80)


@pytest.mark.parametrize("num_samples", [0, 320, MAX_SAMPLES + 1])
def test_lengths_that_are_no_window(num_samples: int) -> None:
    with pytest.raises(ValueError, match="the encoder takes more than"):
        log_mel(np.zeros(num_samples, dtype=np.float32))
