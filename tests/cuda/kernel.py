"""What torch's kernel for segments of unequal length computes, and what it asks of its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool = False,
    scale: float | None = None,
    window: Any = None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_attn::_varlen_attn` on the CPU: out (N, H, D), log-sum-exp (H, N), state of the generator."""
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)
    assert q.dtype in (torch.bfloat16, torch.float16)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension has to be contiguous"
    assert q.size(-1) <= 256
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outs, sums = [], []
    for a, b, c in _segments(q, k, v, cu_q, cu_k):
        scores = _scores(a, b, causal, scale, window)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), _grouped(c, a)))
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs).to(q.dtype), torch.cat(sums, 1), torch.zeros(2, dtype=torch.uint64)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    rng: Tensor,
    scale: float | None = None,
    window: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch_attn::_varlen_attn_backward`: gradients of q, k and v."""
    scale = q.size(-1) ** -0.5 if scale is None else scale
    found = []
    for part, (a, b, c) in zip(grad.float().split(cu_q.diff().tolist()), _segments(q, k, v, cu_q, cu_k), strict=True):
        share = _scores(a, b, causal, scale, window).softmax(-1)
        by_share = torch.einsum("qhd,khd->hqk", part, _grouped(c, a))
        by_score = share * (by_share - (by_share * share).sum(-1, keepdim=True)) * scale
        dq = torch.einsum("hqk,khd->qhd", by_score, _grouped(b, a))
        dk = torch.einsum("hqk,qhd->khd", by_score, a).view(*b.shape[:2], -1, b.size(2)).sum(2)
        dv = torch.einsum("hqk,qhd->khd", share, part).view(*b.shape[:2], -1, b.size(2)).sum(2)
        found.append((dq, dk, dv))
    dq, dk, dv = (torch.cat(parts).to(q.dtype) for parts in zip(*found, strict=True))
    return dq, dk, dv


def _segments(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[Tensor, ...]]:
    queries, keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    return zip(q.float().split(queries), k.float().split(keys), v.float().split(keys), strict=True)


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """Keys or values of every query head."""
    return x.repeat_interleave(like.size(1) // x.size(1), 1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None, window: Any) -> Tensor:
    """(H, q, k); causal attention is aligned at the bottom right."""
    scores = torch.einsum("qhd,khd->hqk", q, _grouped(k, q)) * (q.size(-1) ** -0.5 if scale is None else scale)
    if causal or (window is not None and tuple(window) == (-1, 0)):
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(k.size(0) - q.size(0))
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores
