"""Parity over random architectures, clip lengths from the shortest to 30 s, and mixtures of samples."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from qwen2audio_train.layout import MAX_FRAMES, MIN_FRAMES
from tests.model.rows import pack, pad, random_row
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, pair, worst


def architecture(draw: random.Random) -> dict[str, Any]:
    """Widths, depths, head counts and key/value groups that fit each other."""
    heads = draw.choice([1, 2, 4, 6])
    encoder_heads = draw.choice([1, 2, 3])
    return {
        "audio__d_model": encoder_heads * draw.choice([8, 16]),
        "audio__encoder_attention_heads": encoder_heads,
        "audio__encoder_layers": draw.randint(1, 3),
        "audio__encoder_ffn_dim": draw.choice([24, 40]),
        "audio__num_mel_bins": draw.choice([8, 80, 128]),
        "text__num_attention_heads": heads,
        "text__num_key_value_heads": draw.choice([g for g in (1, 2, 3, 6) if heads % g == 0]),
        "text__hidden_size": heads * draw.choice([8, 16]),
        "text__num_hidden_layers": draw.randint(1, 3),
        "text__intermediate_size": draw.choice([24, 56]),
        "text__rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([1e4, 1e6])},
        "text__model_type": draw.choice(["qwen2", "llama"]),
    }


def clip(draw: random.Random) -> int:
    """Mel frames, short ones as likely as long ones, with the longest now and then."""
    if draw.random() < 0.1:
        return draw.choice([MAX_FRAMES, MAX_FRAMES - 1])
    return int(MIN_FRAMES * (MAX_FRAMES / MIN_FRAMES) ** draw.random())


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(s, marks=pytest.mark.slow) for s in range(4, 24))])
def test_random_architecture_and_mixture(seed: int) -> None:
    draw, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    changes = architecture(draw)
    bands = changes["audio__num_mel_bins"]
    mixture = [[clip(draw) for _ in range(draw.choice([0, 1, 1, 2]))] for _ in range(draw.randint(1, 4))]
    mixture.append([draw.choice([7, 8, 101])])  # keeps the stock model off its legacy path
    rows = [random_row(rng, frames, turns=draw.choice([1, 1, 3]), bands=bands) for frames in mixture]
    draw.shuffle(rows)
    stock, packed = pair(seed, **changes)
    loss, grads = gradients(stock, stock(**pad(rows, rng, bands)).loss)
    out = packed(**pack(rows, bands))
    our_loss, our_grads = gradients(packed, out.nll_sum / out.weight_sum)
    assert torch.allclose(our_loss, loss, rtol=RELATIVE_TOLERANCE, atol=0.0)
    name, gap = worst(our_grads, grads)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e} with clips {mixture}"
