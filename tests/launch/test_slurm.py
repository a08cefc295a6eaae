"""The Slurm template, with srun and scontrol replaced by scripts that say how they were called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "launch/slurm/train.sbatch"


def run_template(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name, script in {
        "srun": 'printf "%s\\n" "threads=$OMP_NUM_THREADS" "$@"',
        "scontrol": "echo node-a; echo node-b",
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42"}
    kept = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PYTHON")}
    command = ["bash", str(TEMPLATE), *arguments]
    env = kept | slurm | environment | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_each_machine_gets_one_torchrun_that_meets_on_the_first(tmp_path: Path) -> None:
    done = run_template(tmp_path, "sft", "name=x", "seed=1", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "threads=8", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "torch.distributed.run", "--nnodes=2",
        "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-id=42", "--rdzv-endpoint=node-a:29500", "launch/sft.py",
        "name=x", "seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(("cpus", "threads"), [("64", "8"), ("4", "1")])
def test_threads_are_shared_among_the_processes(tmp_path: Path, cpus: str, threads: str) -> None:
    done = run_template(tmp_path, "dpo", NPROC_PER_NODE="8", SLURM_CPUS_PER_TASK=cpus)
    assert done.stdout.splitlines()[0] == f"threads={threads}"


def test_a_stage_must_be_named(tmp_path: Path) -> None:
    done = run_template(tmp_path)
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr


def test_the_stages_of_the_template_exist() -> None:
    assert all((ROOT / "launch" / f"{stage}.py").is_file() for stage in ("pretrain", "sft", "dpo"))
