"""A stock and a packed model of equal weights, and the comparison of their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2AudioForConditionalGeneration

from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from tests.model.rows import tiny_config

RELATIVE_TOLERANCE = 1e-5
"""Greatest relative difference in norm, per tensor, in float32."""


def pair(seed: int = 0, **changes: Any) -> tuple[Qwen2AudioForConditionalGeneration, PackedQwen2Audio]:
    """A stock model and a packed one with the same weights."""
    torch.manual_seed(seed)
    packed = PackedQwen2Audio(tiny_config(**changes))
    config = tiny_config(**changes)
    config._attn_implementation = "sdpa"
    stock = Qwen2AudioForConditionalGeneration(config)
    stock.load_state_dict(packed.state_dict())
    return stock, packed


def gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every trainable tensor (zeros where it got none)."""
    model.zero_grad()
    loss.backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[str, float]:
    """Tensor with the greatest relative difference in norm."""
    assert ours.keys() == theirs.keys()
    # A gradient that is zero, or nothing but rounding, is held against the largest of all.
    floor = 1e-6 * max(float(g.norm()) for g in theirs.values())
    gaps = {n: float((ours[n] - g).norm()) / max(float(g.norm()), floor) for n, g in theirs.items()}
    name = max(gaps, key=gaps.__getitem__)
    return name, gaps[name]
