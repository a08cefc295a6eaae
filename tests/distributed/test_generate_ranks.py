"""Decoding on two ranks that share the prompts, also under ZeRO-3, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.generate_worker import results, training_loss
from tests.distributed.ranks import run_ranks
from tests.evaluation.tiny import ending_model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "zero3"])
def test_two_ranks_decode_what_one_does(mode: str, tmp_path: Path) -> None:
    run_ranks("tests.distributed.generate_worker", mode, tmp_path / "texts")
    expected = results(ending_model())
    assert expected["greedy"].count(None) == 1
    for rank in range(2):
        found = json.loads((tmp_path / f"texts.{rank}").read_text())
        losses = found.pop("losses", [])
        assert found == expected
        assert losses == pytest.approx([float(training_loss(ending_model()).detach())] * len(losses), rel=1e-5)
