from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from qwen2audio_train.model import attention
from qwen2audio_train.model.attention import (
    PACKED_ATTENTION,
    _by_segment,
    _varlen,
    packed_attention_forward,
    register_packed_attention,
)

HEADS, WIDTH = 4, 8


class Layer(nn.Module):
    """What the attention function looks at."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal


def heads(count: int, length: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, length, WIDTH, generator=rng).requires_grad_()


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Attention by an N x K mask, in transformers' output layout."""
    key, value = (x.repeat_interleave(HEADS // x.size(1), dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2)


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_segments_see_themselves_alone(causal: bool, groups: int) -> None:
    lengths = [3, 1, 5]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    allowed = owner[:, None] == owner
    if causal:
        allowed = allowed.tril()
    query, key, value = heads(HEADS, 9, 0), heads(groups, 9, 1), heads(groups, 9, 2)
    cu = borders(lengths)
    out, weights = packed_attention_forward(Layer(causal), query, key, value, None, cu_q=cu, cu_k=cu)
    want = dense(query, key, value, allowed)
    assert weights is None
    _assert_same(out, want, (query, key, value))


def test_branches_of_a_tree_see_the_trunk_and_themselves() -> None:
    """Trunk of 4 tokens, branches of 3 and 2: keys of the second branch jump over the first."""
    key_index = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 7, 8])
    allowed = torch.zeros(9, 9, dtype=torch.bool)
    for q in range(9):
        first = 0 if q < 4 else 4 if q < 7 else 7
        allowed[q, : min(4, q + 1)] = True
        allowed[q, first : q + 1] = True
    query, key, value = heads(HEADS, 9, 0), heads(2, 9, 1), heads(2, 9, 2)
    out, _ = packed_attention_forward(
        Layer(True),
        query,
        key,
        value,
        None,
        cu_q=borders([4, 3, 2]),
        cu_k=borders([4, 7, 6]),
        key_index=key_index,
    )
    _assert_same(out, dense(query, key, value, allowed), (query, key, value))


def _assert_same(out: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    assert torch.allclose(out, want, atol=1e-6)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    theirs = torch.autograd.grad((want * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_without_borders_it_is_the_stock_function() -> None:
    query, key, value = heads(HEADS, 6, 0), heads(HEADS, 6, 1), heads(HEADS, 6, 2)
    out, _ = packed_attention_forward(Layer(True), query, key, value, None)
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    assert torch.equal(out, want)


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"sliding_window": 4}])
def test_dropout_and_sliding_windows_are_refused(option: dict[str, float]) -> None:
    query = heads(HEADS, 6, 0)
    cu = borders([6])
    with pytest.raises(ValueError, match="packed attention found"):
        packed_attention_forward(Layer(True), query, query, query, None, cu_q=cu, cu_k=cu, **option)


def test_registering_twice_is_registering_once() -> None:
    register_packed_attention()
    register_packed_attention()
    assert AttentionInterface()[PACKED_ATTENTION] is packed_attention_forward
    assert PACKED_ATTENTION in AttentionMaskInterface()


def old_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: None = None,
    scale: float | None = None,
) -> Tensor:
    """What torch's function does, under the signature of its first releases."""
    assert max_q == int(cu_q.diff().max())
    assert max_k == int(cu_k.diff().max())
    assert q.size(1) == k.size(1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _by_segment(q, k, v, cu_q, cu_k, causal=is_causal, scale=scale)[0]


def new_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: None = None,
) -> Tensor:
    """What torch's function does, under the signature of 2.13."""
    assert window_size in ((-1, 0), (-1, -1))
    if enable_gqa:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    return old_varlen(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=window_size == (-1, 0), scale=scale)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("function", [old_varlen, new_varlen])
def test_arguments_of_the_kernel_in_old_and_new_torch(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor], causal: bool
) -> None:
    """No GPU is needed to see that causality, scale and grouped heads arrive."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    rows = [heads(h, 9, i) for i, h in enumerate((HEADS, 2, 2))]
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in rows)
    cu = borders([4, 3, 2])
    out = _varlen(q, k, v, cu, cu, 4, 4, causal=causal, scale=0.3)
    assert torch.allclose(out, _by_segment(*rows, cu, cu, causal=causal, scale=0.3)[0], atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real kernel runs instead")
def test_bfloat16_on_cuda_takes_the_kernel() -> None:
    """Shapes alone: the tensors have no memory behind them."""
    with FakeTensorMode():
        query, key = (torch.empty(1, h, 9, 64, device="cuda", dtype=torch.bfloat16) for h in (HEADS, 2))
        cu = torch.empty(4, dtype=torch.int32, device="cuda")
        index = torch.empty(17, dtype=torch.int64, device="cuda")
        options = {"cu_q": cu, "cu_k": cu, "key_index": index, "max_q": 5, "max_k": 7}
        out, _ = packed_attention_forward(Layer(True), query, key, key, None, scaling=0.1, **options)
    assert out.shape == (1, 9, HEADS, 64)
    assert out.is_cuda


def test_autocast_leaves_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 queries and keys beside bfloat16 values, as rotary positions make them, would miss the kernel."""
    seen: list[set[torch.dtype]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append({q.dtype, k.dtype, v.dtype})
        return _by_segment(q, k, v, *rest, **options)

    monkeypatch.setattr(attention, "_by_segment", noted)
    query, key = heads(HEADS, 9, 0), heads(HEADS, 9, 1)
    options = {"cu_q": borders([4, 5]), "cu_k": borders([4, 5])}
    with torch.autocast("cpu", torch.bfloat16):
        packed_attention_forward(Layer(True), query, key, key.bfloat16(), None, **options)
    assert seen == [{torch.bfloat16}]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_kernel_equals_the_loop(causal: bool) -> None:
    query, key, value = (
        torch.randn(1, h, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (HEADS, 2, 2)
    )
    cu = borders([100, 7, 193]).cuda()
    options = {"cu_q": cu, "cu_k": cu, "max_q": 193, "max_k": 193}
    out, _ = packed_attention_forward(Layer(causal), query, key, value, None, **options)
    floats = tuple(x.detach().float().requires_grad_() for x in (query, key, value))
    want, _ = packed_attention_forward(Layer(causal), *floats, None, **options)
    assert torch.allclose(out.float(), want, atol=2e-2)
    ours = torch.autograd.grad(out.float().square().sum(), (query, key, value))
    theirs = torch.autograd.grad(want.square().sum(), floats)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b).norm() < 2e-2 * b.norm()
