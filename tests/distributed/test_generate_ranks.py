"""Decoding on two ranks that share the prompts, also under ZeRO-3, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.generate_worker import results, training_loss
from tests.distributed.test_preference_ranks import ROOT, free_port
from tests.evaluation.tiny import ending_model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "zero3"])
def test_two_ranks_decode_what_one_does(mode: str, tmp_path: Path) -> None:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += ["-m", "tests.distributed.generate_worker", mode, str(tmp_path / "texts")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = results(ending_model())
    assert expected["greedy"].count(None) == 1
    for rank in range(2):
        found = json.loads((tmp_path / f"texts.{rank}").read_text())
        losses = found.pop("losses", [])
        assert found == expected
        assert losses == pytest.approx([float(training_loss(ending_model()).detach())] * len(losses), rel=1e-5)
