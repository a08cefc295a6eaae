"""Packed steps of two ranks under every ZeRO stage, one rank without audio or labels, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.zero_worker import WORLD, alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "mode"),
    [
        (0, "full"),
        (1, "full"),
        (2, "frozen"),
        (2, "full"),
        (3, "full"),
        (3, "frozen"),
        (3, "lora"),
        (3, "checkpointed"),
        (3, "lora checkpointed"),
        (2, "selective checkpointed"),
        (3, "lora selective checkpointed"),
    ],
)
def test_ranks_equal_one_process(stage: int, mode: str, tmp_path: Path) -> None:
    run_ranks("tests.distributed.zero_worker", str(stage), mode, tmp_path / "state.pt", world=WORLD)
    found = torch.load(tmp_path / "state.pt")
    expected = alone(mode)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
