"""Packed steps of two ranks under every ZeRO stage, one rank without audio or labels, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.test_preference_ranks import ROOT, free_port
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
    ],
)
def test_ranks_equal_one_process(stage: int, mode: str, tmp_path: Path) -> None:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={WORLD}"]
    command += [f"--master_port={free_port()}", "-m", "tests.distributed.zero_worker"]
    command += [str(stage), mode, str(tmp_path / "state.pt")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(tmp_path / "state.pt")
    expected = alone(mode)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-6), name
