"""What one backend saved, another goes on from: a sample of benchmarks/resume_table.py, which holds all pairs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import ROOT


@pytest.mark.slow
def test_other_backends_and_ranks_go_on_equal(tmp_path: Path) -> None:
    """No backend, ZeRO-2 and ZeRO-3, one rank and two, in full and with LoRA, float32 and bfloat16."""
    command = [sys.executable, str(ROOT / "benchmarks" / "resume_table.py"), "--work", str(tmp_path)]
    chosen = ["--sources", "none-1", "zero3-2", "--targets", "zero2-2", "none-1"]
    done = subprocess.run([*command, *chosen], capture_output=True, text=True, check=True)
    totals = json.loads(done.stdout.splitlines()[-1])
    assert (totals["cells"], totals["carried out"]) == (16, 16)
    assert totals["worst loss"]["fp32"] < 1e-6
    assert totals["worst loss"]["bf16"] < 2e-3
