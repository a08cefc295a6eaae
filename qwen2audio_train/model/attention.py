"""Attention over packed rows: several segments end to end in one row, no padding and no N x N mask.

Shape legend: N query tokens of the row, K gathered keys, S segments, H query heads, G key/value heads, D head width.
A segment is `cu_q[s]:cu_q[s + 1]` of the queries and `cu_k[s]:cu_k[s + 1]` of the keys. Without `key_index` the keys
are the row itself; with it (trees of depth one) they are `key[key_index]`, and a query may attend to more than its own
segment. Causal attention is aligned at the bottom right: the last query of a segment sees all of its keys.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "packed"
"""Name under which the attention function is registered with transformers."""


def register_packed_attention() -> None:
    """Make `attn_implementation="packed"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    key_index: Tensor | None = None,
    max_q: int | None = None,
    max_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' calling convention; without `cu_q` it is their `sdpa`.

    Args:
        query: (1, H, N, D); key and value are (1, G, N, D).
        cu_q, cu_k: (S + 1,) int32 segment borders of queries and keys.
        key_index: (K,) rows of `key` and `value` that the keys of all segments are gathered from, or None.
        max_q, max_k: longest segment of queries and of keys.

    Returns:
        (1, N, H, D) and None for the attention weights.

    Raises:
        ValueError: attention dropout or a sliding window was asked for.
    """
    if cu_q is None or cu_k is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout or kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"packed attention found dropout {dropout} and sliding_window {kwargs.get('sliding_window')}; "
            "it supports neither: set attention_dropout to 0 and use_sliding_window to false in the model's config"
        )
    q, k, v = query, key, value
    if torch.is_autocast_enabled(q.device.type):
        # Rotary positions of float32 weights make float32 of queries and keys: the kernel would not take them.
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if key_index is not None:
        k, v = k.index_select(2, key_index), v.index_select(2, key_index)
    causal = bool(module.is_causal)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        out = _varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal=causal, scale=scaling)
        return out.unsqueeze(0), None
    return _by_segment(q, k, v, cu_q, cu_k, causal=causal, scale=scaling), None


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int | None,
    max_k: int | None,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """torch's own flash kernel for segments of unequal length; (N, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    known = _varlen_parameters()
    options: dict[str, Any] = {"scale": scale}
    if "window_size" in known:
        options["window_size"] = (-1, 0) if causal else (-1, -1)
    else:
        options["is_causal"] = causal
    if q.size(1) != k.size(1):
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return cast(Tensor, varlen_attn(q, k, v, cu_q, cu_k, cast(int, max_q), cast(int, max_k), **options))


def _varlen_parameters() -> frozenset[str]:
    """Parameters of this torch's `varlen_attn`: 2.11 and 2.13 differ."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


@torch.compiler.disable
def _by_segment(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    """One scaled_dot_product_attention per segment, for CPU and for float32 on CUDA; (1, H, N, D) to (1, N, H, D)."""
    q_lengths, k_lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    gqa = q.size(1) != k.size(1)
    outputs = []
    for qs, ks, vs in zip(q.split(q_lengths, 2), k.split(k_lengths, 2), v.split(k_lengths, 2), strict=True):
        num_q, num_k = qs.size(2), ks.size(2)
        mask = None
        if causal and num_q != num_k:
            mask = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).tril(num_k - num_q)
        out = F.scaled_dot_product_attention(
            qs, ks, vs, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=gqa
        )
        outputs.append(out.transpose(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
