"""Figures that nobody reads yet give, once read, what reading them at once gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from qwen2audio_train.training.trainers.figures import Figure, tensor_of, unread


def test_arithmetic_and_tests_are_put_off() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    accelerator = SimpleNamespace()
    with unread(accelerator):
        total, count = accelerator.gather(values).sum(), accelerator.gather_for_metrics(torch.tensor(3)).sum()
        mean = (total / count).item() if count > 0 else 0.0
        seen = 5 + accelerator.gather(values.sum()).item() // 2
    assert isinstance(mean, Figure)
    assert float(tensor_of(mean, values)) == pytest.approx(3.0)
    assert float(tensor_of(seen, values)) == 9
    assert not hasattr(accelerator, "gather")


def test_a_figure_among_the_arguments_of_torch_is_its_tensor() -> None:
    margin = Figure(torch.tensor(0.5))
    logratios = torch.tensor([1.0, -1.0], requires_grad=True)
    loss = torch.cat((1 - F.sigmoid(logratios - margin), 1 - F.sigmoid(0.1 * (margin - logratios))), 0).mean()
    loss.backward()
    plain = logratios.detach().requires_grad_()
    want = torch.cat((1 - F.sigmoid(plain - 0.5), 1 - F.sigmoid(0.1 * (0.5 - plain))), 0).mean()
    want.backward()
    assert torch.equal(loss, want)
    assert torch.equal(logratios.grad, plain.grad)


def test_a_number_that_was_read_after_all_is_a_tensor_too() -> None:
    assert tensor_of(0.25, torch.zeros(2)).dtype == torch.float64
