"""Run a module on several ranks of this machine, over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, *arguments: str | Path, world: int = 2, timeout_s: float = 1800) -> str:
    """`python -m module arguments` under torchrun; returns what was printed.

    Raises:
        AssertionError: a rank failed; the message ends with what it wrote last.
        TimeoutExpired: the ranks hang.
    """
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "-m", module]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*command, *map(str, arguments)], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # not kill: torchrun stops its ranks, which would outlive it
            raise
    assert process.returncode == 0, f"{output[-2000:]}\n{errors[-6000:]}"
    return output
