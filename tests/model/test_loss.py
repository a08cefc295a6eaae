from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2audio_train.model import loss
from qwen2audio_train.model.loss import LabelHead, chunk_rows, label_nll

VOCAB, WIDTH, LABELS = 37, 8, 11


@pytest.fixture
def head() -> LabelHead:
    torch.manual_seed(0)
    return LabelHead(WIDTH, VOCAB, bias=False)


def inputs(labels: int = LABELS) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(labels, WIDTH, generator=rng).requires_grad_()
    return hidden, torch.randint(VOCAB, (labels,), generator=rng), torch.rand(labels, generator=rng)


@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_value_and_gradients_are_those_of_cross_entropy(
    head: LabelHead, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4 * VOCAB * rows)
    assert chunk_rows(VOCAB) == rows
    hidden, target, weight = inputs()
    logits = F.linear(hidden, head.weight)
    nll = F.cross_entropy(logits, target, reduction="none")
    want = torch.autograd.grad((nll * weight).sum() * 3.0, [hidden, head.weight])

    out = label_nll(hidden, head, target, weight)
    got = torch.autograd.grad(out.nll_sum * 3.0, [hidden, head.weight])
    assert torch.allclose(out.nll, nll, atol=1e-6)
    assert not out.nll.requires_grad
    assert torch.equal(out.correct, logits.argmax(-1) == target)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_no_label_is_a_zero_that_still_reaches_hidden_and_head(head: LabelHead) -> None:
    hidden, target, weight = inputs(labels=0)
    out = label_nll(hidden, head, target, weight)
    out.nll_sum.backward()
    assert out.nll_sum.item() == 0.0
    assert hidden.grad is not None
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_a_frozen_head_gets_no_gradient_and_passes_one_on(head: LabelHead) -> None:
    hidden, target, weight = inputs()
    head.weight.requires_grad_(False)
    label_nll(hidden, head, target, weight).nll_sum.backward()
    assert head.weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_without_gradients_nothing_is_kept(head: LabelHead) -> None:
    hidden, target, weight = inputs()
    with torch.no_grad():
        out = label_nll(hidden, head, target, weight)
    assert not out.nll_sum.requires_grad
    assert out.nll_sum.item() == pytest.approx(label_nll(hidden, head, target, weight).nll_sum.item())


def test_loss_of_bfloat16_logits_is_not_rounded_to_bfloat16(head: LabelHead) -> None:
    hidden, target, weight = inputs()
    head.to(torch.bfloat16)
    out = label_nll(hidden.detach().bfloat16(), head, target, weight)
    want = F.cross_entropy(F.linear(hidden.bfloat16(), head.weight).float(), target, reduction="none")
    assert out.nll.dtype is torch.float32
    assert torch.allclose(out.nll, want, atol=1e-6)


def test_autocast_scores_in_its_type_and_returns_gradients_in_theirs(head: LabelHead) -> None:
    hidden, target, weight = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = label_nll(hidden, head, target, weight)
    out.nll_sum.backward()
    want = F.cross_entropy(F.linear(hidden.bfloat16(), head.weight.bfloat16()).float(), target, reduction="none")
    assert torch.allclose(out.nll, want, atol=1e-6)
    assert hidden.grad.dtype is head.weight.grad.dtype is torch.float32


def test_hidden_states_alone_give_logits(head: LabelHead) -> None:
    hidden, _, _ = inputs()
    assert torch.equal(head(hidden), F.linear(hidden, head.weight))


def test_the_scale_of_the_step_is_not_rounded_to_bfloat16(head: LabelHead) -> None:
    """One third is 0.2 % off in bfloat16, and so would be the norm of every gradient."""
    hidden, target, weight = inputs()
    head.to(torch.bfloat16)
    norms = []
    for scale in (1.0, 3.0):
        head.zero_grad()
        (label_nll(hidden.bfloat16(), head, target, weight).nll_sum / scale).backward()
        norms.append(float(head.weight.grad.float().norm()) * scale)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_second_backward_is_refused(head: LabelHead) -> None:
    hidden, target, weight = inputs()
    loss_sum = label_nll(hidden, head, target, weight).nll_sum
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss_sum.backward()


def test_the_gradient_of_the_head_is_summed_in_float32(head: LabelHead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of factors in bfloat16, over a row a chunk: no further off than one rounding of the exact sum."""
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4 * VOCAB)
    hidden, target, weight = (value.detach() for value in inputs(labels=400))
    head.to(torch.bfloat16)
    label_nll(hidden.bfloat16(), head, target, weight).nll_sum.backward()
    logits = F.linear(hidden.bfloat16(), head.weight).float()
    error = (logits.softmax(1) - F.one_hot(target, VOCAB)) * weight.unsqueeze(1)
    want = error.bfloat16().double().t() @ hidden.bfloat16().double()
    assert torch.allclose(head.weight.grad.double(), want, rtol=2**-8, atol=1e-4)
    assert head.weight.grad.dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head.float().weight.grad = None
        label_nll(hidden, head, target, weight).nll_sum.backward()
    assert torch.allclose(head.weight.grad.double(), want, rtol=1e-3, atol=1e-4)
