"""A packed row against the stock model on padded rows: loss and the gradient of every tensor."""

from __future__ import annotations

import pytest
import torch

from tests.model.rows import pack, pad, random_row
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, pair, worst

MIXTURES = {
    "one clip": [((100,), 1)],
    # the stock model takes its legacy path where no clip has two tokens: the fourth keeps it off that
    "shortest clips": [((4,), 1), ((5,), 1), ((6,), 1), ((7,), 1)],
    "odd and even": [((37,), 1), ((38,), 1), ((39,), 1), ((40,), 1)],
    "thirty seconds": [((3000,), 1), ((2999,), 1), ((2998,), 1)],
    "text beside audio": [((), 1), ((51,), 1), ((), 2)],
    "several clips and turns": [((20, 33, 47), 2), ((8,), 1), ((64, 7), 1)],
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES.keys())
def test_packed_row_equals_padded_rows(mixture: list[tuple[tuple[int, ...], int]]) -> None:
    rng = torch.Generator().manual_seed(1)
    rows = [random_row(rng, frames, turns=turns) for frames, turns in mixture]
    stock, packed = pair()
    loss, grads = gradients(stock, stock(**pad(rows, rng)).loss)
    out = packed(**pack(rows))
    our_loss, our_grads = gradients(packed, out.nll_sum / out.weight_sum)
    assert torch.allclose(our_loss, loss, rtol=RELATIVE_TOLERANCE, atol=0.0)
    name, gap = worst(our_grads, grads)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"
