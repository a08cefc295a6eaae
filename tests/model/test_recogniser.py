"""The loss of stage zero against torch's own, clip by clip, over the stock tower padded to 30 s."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2audio_train.data.samples.collate import pack
from qwen2audio_train.families.qwen2_audio import num_audio_tokens
from qwen2audio_train.layout import MAX_SAMPLES
from qwen2audio_train.model.recogniser import Recogniser
from tests.model.rows import AUDIO_ID
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, pair, worst
from tests.parity.test_waveforms_to_gradients import BANDS, sample, stock_batch

SPECIAL = [AUDIO_ID]


@pytest.fixture
def waveforms() -> list[np.ndarray]:
    """Three clips, the last one the longest that there is."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, length).astype(np.float32) for length in (7_000, 23_456, MAX_SAMPLES)]


def spoken_tokens(batch: dict[str, Tensor]) -> list[Tensor]:
    """Transcript of each sample: its labelled tokens that are not special."""
    segment = torch.searchsorted(batch["cu_q"].long(), batch["predict_from"], right=True) - 1
    tokens = [batch["target"][segment == index] for index in range(len(batch["clip_frames"]))]
    return [row[~torch.isin(row, torch.tensor(SPECIAL))] for row in tokens]


def test_loss_and_gradients_are_those_of_padded_clips(waveforms: list[np.ndarray]) -> None:
    stock, packed = pair(audio__num_mel_bins=BANDS)
    vocab = packed.config.text_config.vocab_size
    recogniser = Recogniser(packed, vocab, SPECIAL)
    rng = np.random.default_rng(1)
    samples = [sample(rng, [waveform]) for waveform in waveforms]
    batch = pack(samples, num_mel_bins=BANDS)
    found = gradients(recogniser, recogniser(**batch))

    tower = stock.model.audio_tower
    seen: list[Tensor] = []
    tower.avg_pooler.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stock.requires_grad_(False)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(not name.startswith(("embed_positions", "layer_norm")))
    stock(**stock_batch(samples, waveforms))
    (hidden,) = seen  # (A, d, 1500)
    loss = hidden.new_zeros(())
    for row, frames, tokens in zip(hidden, batch["clip_frames"].tolist(), spoken_tokens(batch), strict=True):
        log_probs = recogniser.lm_head(row.T[: 2 * num_audio_tokens(frames)]).log_softmax(-1)
        loss = loss + F.ctc_loss(
            log_probs,
            tokens,
            torch.tensor(len(log_probs)),
            torch.tensor(len(tokens)),
            blank=vocab,
            reduction="sum",
        )
    recogniser.lm_head.zero_grad()
    expected = gradients(nn.ModuleDict({"audio": stock, "lm_head": recogniser.lm_head}), loss)
    assert torch.allclose(found[0], expected[0], rtol=RELATIVE_TOLERANCE)
    name, gap = worst(found[1], expected[1])
    assert gap < 10 * RELATIVE_TOLERANCE, f"{name}: {gap}"


def test_only_the_tower_and_the_head_learn() -> None:
    _, packed = pair(audio__num_mel_bins=BANDS)
    recogniser = Recogniser(packed, packed.config.text_config.vocab_size, SPECIAL)
    names = {n for n, p in recogniser.named_parameters() if p.requires_grad}
    assert all(n.startswith(("lm_head.", "audio.model.audio_tower.")) for n in names)
    assert not any("embed_positions" in n or "audio_tower.layer_norm" in n for n in names)


def test_a_filler_gives_every_tensor_a_gradient_of_zero() -> None:
    """So that ranks without a clip take part in every reduction."""
    _, packed = pair(audio__num_mel_bins=BANDS)
    recogniser = Recogniser(packed, packed.config.text_config.vocab_size, SPECIAL)
    empty = {
        "mel": torch.zeros(BANDS, 0),
        "clip_frames": torch.zeros(0, dtype=torch.int32),
        "cu_q": torch.tensor([0, 8], dtype=torch.int32),
        "predict_from": torch.zeros(0, dtype=torch.long),
        "target": torch.zeros(0, dtype=torch.long),
    }
    loss, grads = gradients(recogniser, recogniser(**empty))
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())
    assert all(p.grad is not None for p in recogniser.parameters() if p.requires_grad)


def test_a_transcript_longer_than_its_frames_counts_as_zero() -> None:
    _, packed = pair(audio__num_mel_bins=BANDS)
    recogniser = Recogniser(packed, packed.config.text_config.vocab_size, SPECIAL)
    rng = np.random.default_rng(2)
    batch = pack([sample(rng, [rng.normal(0, 0.1, 800).astype(np.float32)])], num_mel_bins=BANDS)
    assert 2 * num_audio_tokens(int(batch["clip_frames"][0])) < len(spoken_tokens(batch)[0])
    loss, grads = gradients(recogniser, recogniser(**batch))
    assert loss == 0
    assert all(torch.isfinite(grad).all() for grad in grads.values())
