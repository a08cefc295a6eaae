"""Negative log-likelihood of the labelled positions only, without ever holding all of their logits.

Shape legend: M labelled positions, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LOGIT_BYTES = 2**29
"""Size of one chunk of float32 logits: 860 rows of Qwen2-Audio's vocabulary."""

SCALED_ROWS = 2**14
"""Rows that are held in float32 at once while gradients are scaled: 256 MiB at a width of 4 096, where the whole
gradient of Qwen2-Audio's head takes 2.4 GiB."""


LabelObjective = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""A loss other than the weighted sum: from the nll (m,) of the labels at a slice of M to their share of the loss () and
its derivative by each nll (m,). It lets an objective of policies read and weigh log-probabilities in the one pass that
makes the gradients."""


class LabelLoss(NamedTuple):
    """What the labels of a pack cost."""

    nll_sum: Tensor  # () float32, differentiable: sum of weight x nll, or the objective's loss
    nll: Tensor  # (M,) float32, detached
    correct: Tensor  # (M,) bool: the label is the most likely token


class LabelHead(nn.Linear):
    """An LM head that can also score labels.

    The scoring is one call of the module, so that ZeRO-3 gathers the weight once per pass, however many chunks there
    are. Called with hidden states alone it is the plain `nn.Linear`.
    """

    def forward(
        self,
        hidden: Tensor,
        target: Tensor | None = None,
        weight: Tensor | None = None,
        objective: LabelObjective | None = None,
    ) -> Any:
        """Logits of `hidden` (..., d), or, given `target` and `weight` (M,), the `LabelLoss` of `hidden` (M, d)."""
        if target is None:
            return super().forward(hidden)
        return LabelLoss(*_LabelNll.apply(hidden, self.weight, target, weight, objective, torch.is_grad_enabled()))


def label_nll(
    hidden: Tensor, lm_head: nn.Module, target: Tensor, weight: Tensor, objective: LabelObjective | None = None
) -> LabelLoss:
    """Weighted negative log-likelihood of `target` (M,) given `hidden` (M, d).

    Logits are taken in the head's precision and turned to float32 before the softmax. With no label at all the sum is
    a zero that is still connected to `hidden` and the head.

    Args:
        lm_head: a `LabelHead`, bare or wrapped by something that passes its arguments on.
        weight: (M,) float32 factor of every label in the sum.
        objective: what to sum instead of weight x nll.
    """
    out: LabelLoss = lm_head(hidden, target, weight, objective)
    return out


def chunk_rows(vocab_size: int) -> int:
    """Rows whose float32 logits fit `LOGIT_BYTES`."""
    return max(1, LOGIT_BYTES // (4 * vocab_size))


class _LabelNll(torch.autograd.Function):
    """Loss and gradients of a chunk of rows while its logits are at hand; backward only scales them.

    The gradient of the weighted sum is known up to the scalar that arrives in backward, so the logits need neither be
    kept nor computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        target: Tensor,
        weight: Tensor,
        objective: LabelObjective | None,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        with torch.autocast(device, enabled=False):
            x, w, weight = hidden.to(dtype), head.to(dtype), weight.float()
            dx = torch.empty_like(x) if with_grad and ctx.needs_input_grad[0] else None
            # In float32: summed in bfloat16, eighty chunks would be 1 % off, each rounding what came before.
            summed = torch.promote_types(dtype, torch.float32)
            dw = torch.zeros_like(w, dtype=summed) if with_grad and ctx.needs_input_grad[1] else None
            nll = torch.empty(len(x), dtype=torch.float32, device=x.device)
            correct = torch.empty(len(x), dtype=torch.bool, device=x.device)
            loss = torch.zeros((), dtype=torch.float32, device=x.device)
            rows = chunk_rows(len(w))
            for start in range(0, len(x), rows):
                at = slice(start, start + rows)
                logits = (x[at] @ w.t()).float()
                label = logits.gather(1, target[at].unsqueeze(1)).squeeze(1)
                top, likeliest = logits.max(dim=1)
                total = logits.sub_(top.unsqueeze(1)).exp_().sum(dim=1)
                nll[at], correct[at] = total.log() + top - label, likeliest == target[at]
                slope = weight[at]
                if objective is not None:
                    share, slope = objective(nll[at], at)
                    loss += share
                if dx is None and dw is None:
                    continue
                error = _error(logits, total, target[at], slope).to(dtype)
                if dx is not None:
                    torch.mm(error, w, out=dx[at])
                if dw is not None:
                    _add_product(dw, error.t(), x[at])
        ctx.grads = (None if dx is None else dx.to(hidden.dtype), dw)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(nll, correct)
        return loss if objective is not None else (nll * weight).sum(), nll, correct

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        # Scaled in place: a copy of the head's gradient would be as large as the head. So backward can run once only.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the loss of a pack can be differentiated once only; compute it anew")
        dx, dw = (None if g is None else _scale(g, grad) for g in grads)
        return dx, None if dw is None else dw.to(ctx.head_dtype), None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the float32 `total`, in place; what factors in bfloat16 give is not rounded to it."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # where there is no such kernel
        total.addmm_(a.float(), b.float())


def _scale(grads: Tensor, factor: Tensor) -> Tensor:
    """`grads` times the float32 `factor`, in place, without rounding the factor to their type."""
    for piece in grads.split(SCALED_ROWS):
        piece.copy_(piece.float() * factor)
    return grads


def _error(exps: Tensor, total: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the weighted sum by the logits, written over their (m, V) exponentials; `total` is the rows' sum."""
    error = exps.mul_((weight / total).unsqueeze(1))
    error[torch.arange(len(target), device=target.device), target] -= weight
    return error
